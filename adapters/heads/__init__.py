"""A head as data, and what it computes. Numpy alone."""

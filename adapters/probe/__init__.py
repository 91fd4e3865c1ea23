"""Fits a head on embeddings. Numpy alone."""

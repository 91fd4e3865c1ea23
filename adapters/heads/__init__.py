"""Heads as data, and what they compute. NumPy only."""

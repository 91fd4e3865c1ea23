"""Fits and measures heads on embeddings, with NumPy alone."""

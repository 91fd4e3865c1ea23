"""Databases with stores, and the flows above them."""

"""Batching of inputs from many callers."""

"""Measurements of the running service beside its alternatives, in one run, on real data."""

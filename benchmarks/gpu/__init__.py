"""Figures of an NVIDIA GPU, and the bundle with which they are taken where there is no network."""

"""Losses when processes are killed."""

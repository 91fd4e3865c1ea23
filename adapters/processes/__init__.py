"""Processes that fit, and how they are watched."""

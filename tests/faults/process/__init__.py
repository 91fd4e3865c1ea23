"""Processes that are killed, stopped or stuck in the middle of their work."""

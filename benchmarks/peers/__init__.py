"""Servers that a team would run instead, written as their documentation says."""

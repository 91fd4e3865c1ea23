"""Backbones whose weights come in Python packages with formats of their own."""

"""Reported scores beside true ones."""

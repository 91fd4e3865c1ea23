"""Backup, restore, inspection and repair."""

"""Housekeeping of the database, done by one process for all that share it."""

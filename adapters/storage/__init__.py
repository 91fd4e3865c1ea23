"""Stores the bytes of artifacts in a folder or a bucket."""

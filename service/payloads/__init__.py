"""Schemas of the HTTP API, readers of request bodies and writers of responses."""

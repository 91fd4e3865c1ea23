"""Responses of the HTTP API, a module for each resource: their types, and how they are built from results."""

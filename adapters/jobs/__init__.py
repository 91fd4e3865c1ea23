"""Durable work in processes of its own."""

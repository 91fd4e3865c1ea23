"""Embeddings in, answers out."""

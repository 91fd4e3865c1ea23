"""Predictions: embeddings in, answers out."""

"""Durable jobs: what they are asked for, and how one attempt at each is run."""

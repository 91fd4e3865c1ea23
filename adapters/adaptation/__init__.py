"""Changes to an adapter: examples in, a new version out."""

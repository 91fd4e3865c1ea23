"""Examples in, a version out: what changes an adapter."""

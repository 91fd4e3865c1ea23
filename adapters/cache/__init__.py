"""In-memory caches: heads, networks, aliases."""

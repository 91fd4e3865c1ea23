"""SQL statements that run inside a caller's transaction."""

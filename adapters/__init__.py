"""The per-tenant side: examples, heads, their fitting, and where they are kept."""

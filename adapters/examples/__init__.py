"""What tenants send: examples, uploads and their forms."""

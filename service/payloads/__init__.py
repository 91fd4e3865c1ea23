"""Bodies of the HTTP API: the schemas and readers of requests, and in a folder of its own the responses."""

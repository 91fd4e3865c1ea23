"""The routes: each reads the request, calls the adapters and builds the response."""

"""The process and its connections: the code that relies on internals of uvicorn and BentoML."""

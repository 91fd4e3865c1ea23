"""The process and its connections: all that knows the insides of uvicorn and BentoML."""

"""HTTP in, one domain call, HTTP out. The only package that imports BentoML's server and FastAPI."""

__version__ = "0.1.0"

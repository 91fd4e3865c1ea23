"""The edge: HTTP in, a domain call, HTTP out. The only package that imports bentoml's server and fastapi."""

__version__ = "0.1.0"

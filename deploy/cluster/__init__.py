"""A whole cluster on one machine, from packages: `python -m deploy.cluster`."""

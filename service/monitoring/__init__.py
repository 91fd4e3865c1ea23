"""Metrics of the service, and monitors that replace what hangs and measure plans again."""

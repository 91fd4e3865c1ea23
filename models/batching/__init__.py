"""Inputs of many callers, run together."""

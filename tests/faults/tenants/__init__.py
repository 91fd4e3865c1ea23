"""Isolation and erasure of tenants."""

"""Inputs and requests that are damaged, odd or hostile."""

"""Accuracy and cost of adapters and fine-tunes."""

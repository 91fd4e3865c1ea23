"""Fine-tuning of a whole network. Requires torch."""

"""What adapters and fine-tunes are worth, and what they take."""

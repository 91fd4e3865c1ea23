"""Fine-tunes of a whole network. Torch lives here."""

"""Images and texts as networks take them."""

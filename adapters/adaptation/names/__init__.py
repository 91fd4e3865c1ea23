"""What the names of labels say to a backbone."""

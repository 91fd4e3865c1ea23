"""What is read and written in one transaction."""

"""What the service tells of itself, and what it does about parts that hang."""

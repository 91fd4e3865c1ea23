"""What a service gives, and what it does to some while it serves others."""

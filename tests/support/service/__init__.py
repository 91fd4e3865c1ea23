"""Services, and callers of them."""

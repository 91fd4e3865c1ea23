"""The database: rows, and transactions over them."""

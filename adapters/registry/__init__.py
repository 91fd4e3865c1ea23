"""The registry: tables, and the transactions that read and write them."""

"""One revision of an adapter: where its rows lie, its files, and the transaction."""

"""Training examples as tenants send them, and the formats of bulk uploads."""

"""What tenants see and leave behind."""

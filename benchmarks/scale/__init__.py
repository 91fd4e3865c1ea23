"""What many tenants and replicas cost, by simulation."""

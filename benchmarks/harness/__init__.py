"""What benchmarks have in common: services, clients, load and reports."""

"""Services, clients, load and reports that benchmarks share."""

"""Models and inputs that several tests use."""

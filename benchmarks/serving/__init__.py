"""Speed of a service, and the effect of some callers on others."""

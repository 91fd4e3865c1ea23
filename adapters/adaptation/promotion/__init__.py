"""Whether a new version may go live."""

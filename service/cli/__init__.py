"""The command `topwork`."""

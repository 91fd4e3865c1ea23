"""The GPU bundle, rehearsed without a GPU where nothing of this project is installed."""

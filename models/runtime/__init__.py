"""ONNX Runtime, and how a backbone runs best on it."""

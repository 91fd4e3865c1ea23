"""ONNX Runtime sessions, and the fastest way to run a backbone in them."""

"""Networks of users: loaded by timm and sentence-transformers, or read from ONNX files."""

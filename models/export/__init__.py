"""Networks to ONNX. Torch lives here."""

"""Export of torch networks to ONNX: the only part of `models` that imports torch."""

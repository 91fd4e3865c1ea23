"""The frozen side: backbones, their preprocessing, and the queue in front of them."""

import os

# ONNX Runtime reports to its maker unless this is set before its import, and all that import it are in this
# package: the one import that changes something in the process.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

"""LitServe with dynamic batching around the same torch network and a scikit-learn head.

python -m benchmarks.peers.lit {image,text} PORT EXAMPLES

EXAMPLES is a folder of inputs named <label>.<number>.
"""

from __future__ import annotations

import base64
import sys
from pathlib import Path
from typing import Any

import litserve
from sklearn.linear_model import LogisticRegression

from models.export.loaders import load_network

BATCH = 32
BATCH_SECONDS = 0.005


class Classifier(litserve.LitAPI):  # type: ignore[misc]
    """Decodes one by one, embeds together."""

    def __init__(self, kind: str, folder: Path) -> None:
        super().__init__(max_batch_size=BATCH, batch_timeout=BATCH_SECONDS)
        self.kind = kind
        self.folder = folder

    def setup(self, device: str) -> None:
        """Loads the network and fits the head, once, in the worker's process."""
        self.embed = load_network("efficientnet-lite0" if self.kind == "image" else "minilm-l6-v2").reference
        files = sorted(self.folder.iterdir())
        inputs = [file.read_bytes() if self.kind == "image" else file.read_text() for file in files]
        self.head = LogisticRegression(max_iter=1000)
        self.head.fit(self.embed(inputs), [file.name.rpartition(".")[0] for file in files])

    # LitServe makes a parameter of the route of what is annotated.
    def decode_request(self, request) -> Any:  # type: ignore[no-untyped-def]
        """{"image": base64} or {"text": …}."""
        return base64.b64decode(request["image"]) if self.kind == "image" else request["text"]

    def batch(self, inputs: list[Any]) -> list[Any]:
        """A batch is a list."""
        return inputs

    def predict(self, inputs: list[Any]) -> Any:
        """Probabilities, a row per input."""
        return self.head.predict_proba(self.embed(inputs))

    def unbatch(self, output: Any) -> Any:
        """A row per request."""
        return list(output)

    def encode_response(self, output: Any) -> dict[str, Any]:
        """The best label."""
        best = int(output.argmax())
        return {"label": str(self.head.classes_[best]), "confidence": float(output[best])}


if __name__ == "__main__":
    kind, port, folder = sys.argv[1:]
    server = litserve.LitServer(Classifier(kind, Path(folder)), accelerator="cpu", timeout=60)
    server.run(host="127.0.0.1", port=int(port), generate_client_file=False, log_level="warning")

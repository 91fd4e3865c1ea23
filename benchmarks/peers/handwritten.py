"""The service a team writes by hand: FastAPI, the torch network as its library loads it, scikit-learn.

python -m benchmarks.peers.handwritten {image,text} PORT EXAMPLES

EXAMPLES is a folder of inputs named <label>.<number>. One request is one input; nothing is batched.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from fastapi import FastAPI, File, UploadFile
from pydantic import BaseModel
from sklearn.linear_model import LogisticRegression

from models.export.loaders import load_network


class TextIn(BaseModel):
    """A text to classify."""

    text: str


def main() -> None:
    """Fits the head, and serves."""
    kind, port, folder = sys.argv[1:]
    embed = load_network("efficientnet-lite0" if kind == "image" else "minilm-l6-v2").reference
    files = sorted(Path(folder).iterdir())
    inputs = [file.read_bytes() if kind == "image" else file.read_text() for file in files]
    head = LogisticRegression(max_iter=1000)
    head.fit(embed(inputs), [file.name.rpartition(".")[0] for file in files])
    app = FastAPI()

    def answer(value: Any) -> dict[str, Any]:
        chances = head.predict_proba(embed([value]))[0]
        best = int(chances.argmax())
        return {"label": str(head.classes_[best]), "confidence": float(chances[best])}

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    if kind == "image":

        @app.post("/predict")
        def predict_image(file: Annotated[UploadFile, File()]) -> dict[str, Any]:
            return answer(file.file.read())

    else:

        @app.post("/predict")
        def predict_text(body: TextIn) -> dict[str, Any]:
            return answer(body.text)

    uvicorn.run(app, host="127.0.0.1", port=int(port), log_level="warning")


if __name__ == "__main__":
    main()

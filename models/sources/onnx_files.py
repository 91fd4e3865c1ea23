"""The files of a network that comes as ONNX: the graph, the data beside it, and what describes them."""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.digests import file_sha256
from models.protobuf import GRAPH_INITIALIZER, MODEL_GRAPH, InvalidGraph, fields
from models.sources.source import ExportRefused
from models.spec import GRAPH_FILE, TOKENIZER_FILE

# The descriptions that decide on embeddings, as the libraries name them.
_DESCRIPTIONS = (
    TOKENIZER_FILE,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "config.json",
    "preprocessor_config.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "modules.json",
    "1_Pooling/config.json",
)
# A hub's repository has its graphs in a folder of this name, and the descriptions one level up.
_INNER = "onnx"
# Field numbers of onnx.proto3: where a constant's values are, outside of the graph.
_TENSOR_EXTERNAL, _KEY, _VALUE = 13, 1, 2


@dataclass(frozen=True, slots=True)
class OnnxFiles:
    """An ONNX graph and the folders in which its descriptions are, the first one first."""

    graph: Path
    folders: tuple[Path, ...]

    @classmethod
    def at(cls, path: Path) -> OnnxFiles:
        """The files of an ONNX file, or of a folder with model.onnx. Raises ExportRefused."""
        if path.is_dir():
            inside = [path / GRAPH_FILE, path / _INNER / GRAPH_FILE]
            graph = next((one for one in inside if one.is_file()), None)
            if graph is None:
                others = ", ".join(sorted(one.name for one in path.glob("*.onnx"))[:3])
                hint = f" It has {others}: name the file." if others else ""
                raise ExportRefused(f"The folder {path} has no {GRAPH_FILE}.{hint}")
        elif path.suffix == ".onnx":
            graph = path
        else:
            raise ExportRefused(f"{path} is not an ONNX file: its name should end in .onnx.")
        beside = graph.parent
        return cls(graph, (beside, beside.parent) if beside.name == _INNER else (beside,))

    def find(self, name: str) -> Path | None:
        """The file of this name, in the first folder that has it."""
        return next((folder / name for folder in self.folders if (folder / name).is_file()), None)

    def read(self, name: str) -> Any:
        """The content of a JSON file, {} if there is none. Raises ExportRefused."""
        path = self.find(name)
        try:
            return {} if path is None else json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ExportRefused(f"{path} is not JSON: {error}.") from error

    def data(self) -> list[Path]:
        """The files that hold constants of the graph. Raises ExportRefused, also if one is missing."""
        files = []
        for name in sorted(_external_names(self.graph)):
            path = Path(name)
            if path.is_absolute() or ".." in path.parts:
                raise ExportRefused(f"{self.graph} has data in {name!r}, which is outside of its folder.")
            files.append(self.graph.parent / path)
            if not files[-1].is_file():
                raise ExportRefused(
                    f"{self.graph} has its weights in {files[-1]}, which is missing. Copy it there too."
                )
        return files

    def sha256(self) -> str:
        """The sha256, in hex, of everything that decides on embeddings. Raises ExportRefused."""
        digest = hashlib.sha256(f"graph\0{file_sha256(self.graph)}\n".encode())
        described = [(name, self.find(name)) for name in _DESCRIPTIONS]
        for name, path in [*((path.name, path) for path in self.data()), *described]:
            if path is not None:
                digest.update(f"{name}\0{file_sha256(path)}\n".encode())
        return digest.hexdigest()


def _external_names(graph: Path) -> set[str]:
    """The names of the files in which a graph's constants are."""
    try:
        with graph.open("rb") as file:
            # The graph may be large, and only its structure is read. The map is closed with its last view.
            model = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        return {
            location
            for graph_field, _, content in fields(model)
            if graph_field == MODEL_GRAPH
            for part, _, tensor in fields(content)
            if part == GRAPH_INITIALIZER
            for location in _locations(tensor)
        }
    except (InvalidGraph, ValueError) as error:
        raise ExportRefused(f"{graph} is not an ONNX model, or it is truncated.") from error


def _locations(tensor: memoryview) -> Iterator[str]:
    for number, _, entry in fields(tensor):
        if number == _TENSOR_EXTERNAL:
            pair = {key: bytes(value) for key, _, value in fields(entry)}
            if pair.get(_KEY) == b"location":
                yield pair.get(_VALUE, b"").decode()

"""Sources of backbones as the settings name them: `timm:resnet18`, or `mine=timm:resnet18`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from models.errors import DomainError
from models.spec import (
    ONNX,
    PACKAGE,
    PACKAGED,
    SENTENCE_TRANSFORMERS,
    TIMM,
    TRANSFORMERS,
    UnknownBackbone,
)

FORMS = (
    f"{TIMM}:<name or folder>, {TIMM}:<architecture>@<file>, {SENTENCE_TRANSFORMERS}:<name or folder>, "
    f"{TRANSFORMERS}:<name or folder>, {ONNX}:<file or folder>"
)
"""How a source that is not packaged can be written."""

_LIBRARIES = (TIMM, SENTENCE_TRANSFORMERS, TRANSFORMERS, ONNX)
_SHORT_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,47}")
_CHECKPOINTS = (".pth", ".pt", ".bin", ".ckpt", ".safetensors")


class ExportRefused(DomainError):
    """The network cannot be served: its files, an unsupported part, or ONNX differs from the original."""

    code = "export_refused"


@dataclass(frozen=True, slots=True)
class Source:
    """Where the weights of one backbone are."""

    name: str  # the backbone's name in the API
    library: str
    place: str  # a path, or a name on a hub; a package's module
    architecture: str = ""  # of a checkpoint, which does not say its own

    @property
    def text(self) -> str:
        """The source as in the settings, without a short name."""
        return f"{self.library}:{f'{self.architecture}@' if self.architecture else ''}{self.place}"

    @property
    def has_short_name(self) -> bool:
        """Whether the settings give the backbone a name of its own."""
        return self.library != PACKAGE and self.name != self.text

    @property
    def path(self) -> Path | None:
        """The path, absolute and without links, whether or not it exists; None for a package or a hub."""
        if self.library == PACKAGE:
            return None
        path = Path(self.place).expanduser()
        is_path = self.library == ONNX or self.architecture or self.place.startswith(("/", ".", "~"))
        return path.resolve() if is_path or path.is_dir() else None

    def existing(self) -> Path | None:
        """The path, None for a package or a hub. Raises ExportRefused if the path does not exist."""
        path = self.path
        if path is not None and not path.exists():
            raise ExportRefused(f"There is nothing at {path}. {_expected(self)}")
        return path

    def folder(self) -> Path | None:
        """The folder, None for a package or a hub. Raises ExportRefused if the path is not a folder."""
        path = self.existing()
        if path is None or path.is_dir():
            return path
        hint = _expected(self)
        if path.suffix == ".onnx":
            hint = f"An ONNX file is named {ONNX}:{path}."
        elif path.suffix in _CHECKPOINTS and self.library == TIMM:
            hint = f"A checkpoint needs its architecture: {TIMM}:<architecture>@{path}."
        raise ExportRefused(f"{path} is not a folder. {hint}")


def parse_source(entry: str) -> Source:
    """Read an entry of the settings. Raises UnknownBackbone; whether a path exists is not looked at."""
    if entry in PACKAGED:
        library, _, module = PACKAGED[entry].source.partition(":")
        return Source(entry, library, module)
    short, separator, rest = entry.partition("=")
    if not separator or ":" in short:
        return _parse(entry, entry)
    short, rest = short.strip(), rest.strip()
    if not _SHORT_NAME.fullmatch(short):
        raise UnknownBackbone(
            f"{short!r} in {entry!r} cannot be the name of a backbone. Use 1 to 48 lower case letters, "
            "digits, '-', '.' and '_'; the first is a letter or a digit."
        )
    if short in PACKAGED:
        raise UnknownBackbone(f"{short!r} in {entry!r} is the name of a packaged backbone. Use another name.")
    if rest in PACKAGED:
        raise UnknownBackbone(f"{rest!r} in {entry!r} is packaged and keeps its name. Write {rest!r} alone.")
    return _parse(short, rest)


def parse_sources(entries: Sequence[str]) -> tuple[Source, ...]:
    """Read all entries of the settings. Raises UnknownBackbone, also if two of them have one name."""
    sources = tuple(parse_source(entry) for entry in entries)
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise UnknownBackbone(f"Two backbones are called {name!r}. Name each of them once.")
    return sources


def entry_of(name: str, entries: Sequence[str]) -> str:
    """The entry of the settings that serves a backbone under this name; the name itself if there is none.

    A name that is its own source, such as a packaged one, needs no entry.
    """
    return next((entry for entry in entries if parse_source(entry).name == name), name)


def _parse(name: str, text: str) -> Source:
    library, separator, place = text.partition(":")
    if not separator:
        raise UnknownBackbone(
            f"{text!r} is not a backbone, and TOPWORK_BACKBONES gives no backbone this name. "
            f"Packaged are {', '.join(PACKAGED)}; others are {FORMS}."
        )
    if library not in _LIBRARIES:
        raise UnknownBackbone(f"{library!r} in {text!r} is not a known library. Use {FORMS}.")
    if not place:
        raise UnknownBackbone(f"{text!r} names nothing after the colon. Use {FORMS}.")
    architecture, separator, file = place.partition("@")
    if library != TIMM or not separator or "/" in architecture:
        return Source(name, library, place)
    if not architecture or not file:
        raise UnknownBackbone(f"{text!r} is incomplete. A checkpoint is {TIMM}:<architecture>@<file>.")
    return Source(name, library, file, architecture)


def _expected(source: Source) -> str:
    if source.library == ONNX:
        return "An ONNX file, or a folder with model.onnx, should be there."
    if source.architecture:
        return f"A checkpoint ({', '.join(_CHECKPOINTS)}) should be there."
    if source.library == TIMM:
        return "A folder with config.json and model.safetensors should be there."
    if source.library == TRANSFORMERS:
        return "A folder with config.json, model.safetensors and tokenizer.json should be there."
    return "A folder as sentence-transformers' `save` writes it should be there."

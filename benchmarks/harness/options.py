"""The command line of a benchmark: its parts, and the folder of the data sets."""

from __future__ import annotations

import argparse
import os
from collections.abc import Collection, Sequence
from pathlib import Path

from benchmarks.data.archives import DEFAULT_FOLDER
from benchmarks.harness.report import program


def asked(
    about: str | None,
    parts: Collection[str],
    arguments: Sequence[str] | None,
    *,
    seeds: int | None = None,
) -> argparse.Namespace:
    """The options: `parts`, named or all, `data`, a folder, and `seeds`, a number, where it has a default.

    about: the module's docstring. arguments: of the command line where None. Ends the process with
    an explanation for a part that is none.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {program()}", description=(about or "").partition("\n")[0]
    )
    parser.add_argument("parts", nargs="*", metavar="part", help=", ".join(parts))
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("TOPWORK_DATA", DEFAULT_FOLDER)))
    if seeds is not None:
        parser.add_argument("--seeds", type=int, default=seeds)
    found = parser.parse_args(arguments)
    unknown = set(found.parts) - set(parts)
    if unknown:
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    found.parts = found.parts or list(parts)
    return found

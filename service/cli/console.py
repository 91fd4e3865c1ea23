"""What commands print: tables and colours on a terminal, lines of JSON anywhere else."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

import typer


def on_terminal() -> bool:
    """Whether a person reads the output. A process may also have no output at all."""
    return sys.stdout is not None and sys.stdout.isatty()


def command_group(about: str) -> typer.Typer:
    """Return a group of commands whose help has colours on a terminal only."""
    return typer.Typer(
        help=about,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich" if on_terminal() else None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


def show(record: Mapping[str, Any]) -> None:
    """Print one record: indented and in colours on a terminal, else as a line of JSON."""
    line = json.dumps(record, default=datetime.isoformat)
    if on_terminal():
        from rich import print_json

        # Escaped, because tenants choose some of the text and terminals obey control characters.
        print_json(line, ensure_ascii=True)
    else:
        print(line, flush=True)


def show_all(records: Iterable[Mapping[str, Any]]) -> None:
    """Print records of one kind: a table on a terminal, else a line of JSON each."""
    if not on_terminal():
        for record in records:
            show(record)
        return
    rows = list(records)
    if not rows:
        return
    from rich import print as rich_print
    from rich.table import Table
    from rich.text import Text

    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(Text(_cell(value)) for value in row.values()))
    rich_print(table)


def _cell(value: Any) -> str:
    match value:
        case None:
            text = ""
        case datetime():
            text = f"{value:%Y-%m-%d %H:%M:%S}"
        case str():
            text = value
        case dict():
            text = ", ".join(f"{name}={_cell(item)}" for name, item in value.items() if item is not None)
        case list() | tuple():
            text = ", ".join(map(_cell, value))
        case _:
            text = str(value)
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)

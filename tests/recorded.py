"""The recorded contract with users and operators; `python -m tests.recorded` records it again.

A change of the code that is not meant to change it must leave it as it is; one that is meant to shows in the
difference of the recorded file.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateIndex, CreateTable

from adapters.registry.schema import metadata
from benchmarks.harness.service_process import ROOT, Serving
from service.settings import Settings

FILE = Path(__file__).with_name("recorded.json")
_PACKAGES = ("models", "adapters", "service")
_COMMANDS = (
    (), ("serve",), ("worker",),
    ("tenants",), ("tenants", "create"), ("tenants", "list"), ("tenants", "quotas"), ("tenants", "erase"),
    ("keys",), ("keys", "create"), ("keys", "list"), ("keys", "rotate"), ("keys", "revoke"),
    ("backup",), ("restore",), ("doctor",), ("migrate",), ("plan",),
)  # fmt: skip


def contract(url: str) -> dict[str, Any]:
    """All of it; url: of a running service with the packaged backbones."""
    return {
        "openapi": json.loads(_get(f"{url}/openapi.json")),
        "metrics": metrics(_get(f"{url}/metrics")),
        "settings": settings(),
        "commands": commands(),
        "tables": tables(),
        "codes": codes(),
    }


def metrics(text: str) -> list[str]:
    """Names and types of this service's own metrics, of what Prometheus scrapes."""
    lines = (line.split(" ")[2:] for line in text.splitlines() if line.startswith("# TYPE topwork_"))
    return sorted(" ".join(line) for line in lines)


def settings() -> dict[str, str]:
    """Each variable with its type and default."""
    return {
        f"TOPWORK_{name.upper()}": f"{field.annotation} = "
        + ("computed" if field.default_factory is not None else repr(field.default))
        for name, field in Settings.model_fields.items()
    }


def commands() -> dict[str, str]:
    """The help of each command."""
    found = {}
    for words in _COMMANDS:
        line = [str(Path(sys.executable).with_name("topwork")), *words, "--help"]
        environment = {**os.environ, "COLUMNS": "100"}
        done = subprocess.run(line, capture_output=True, text=True, check=True, env=environment)
        found[" ".join(["topwork", *words])] = done.stdout
    return found


def tables() -> dict[str, str]:
    """The statements that make each table with its indexes, as PostgreSQL takes them."""
    dialect: Any = postgresql.dialect()  # type: ignore[no-untyped-call]
    found = {}
    for name, table in sorted(metadata.tables.items()):
        indexes = [CreateIndex(index) for index in sorted(table.indexes, key=str)]
        statements: list[Any] = [CreateTable(table), *indexes]
        found[name] = "".join(str(statement.compile(dialect=dialect)) for statement in statements)
    return found


def codes() -> list[str]:
    """The codes of errors that classes declare."""
    found = set()
    for package in _PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for one in ast.walk(ast.parse(path.read_text())):
                if isinstance(one, ast.ClassDef):
                    found |= {
                        str(line.value.value)
                        for line in one.body
                        if isinstance(line, ast.Assign)
                        and [ast.unparse(target) for target in line.targets] == ["code"]
                        and isinstance(line.value, ast.Constant)
                    }
    return sorted(found)


def _get(url: str) -> str:
    with urllib.request.urlopen(url) as answer:
        text: str = answer.read().decode()
        return text


def main() -> int:
    """Records what a service of this code says."""
    with tempfile.TemporaryDirectory(prefix="topwork-recorded-") as home, Serving(Path(home)) as serving:
        FILE.write_text(json.dumps(contract(serving.url), indent=1, sort_keys=True) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

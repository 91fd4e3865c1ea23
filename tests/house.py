"""`make house`: how the code is laid out and how it reads, in numbers.

`--write` puts the table of folders into the documents, `--verbose` names what is counted.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("service", "adapters", "models")
DOCUMENT = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- folders: made by `make house ARGS=--write` -->", "<!-- end of folders -->"
# A comment that begins so leaves its reader to find out what it speaks of.
_DANGLING = re.compile(
    r"(Of|For|With|Without|From|To|Than|By|Between|Beyond|Below|Above|Until|Up to|After so|So many|So long|"
    r"Which|Whose|Whoever|Whatever|What|Whether|That|Where|Not|Nor|And|Or|But)\b"
)
_GERUND = re.compile(r"^[a-z]+ing$")
# Nouns that end in the same way.
_NOUNS = {"monitoring", "batching", "string", "pacing", "scaling"}
_OURS = {"service", "adapters", "models"}


@dataclass(frozen=True, slots=True)
class Folder:
    """sentence: of its `__init__`. modules: name and lines."""

    name: str
    sentence: str
    modules: tuple[tuple[str, int], ...]


@cache
def files() -> tuple[Path, ...]:
    """The modules of the three packages."""
    return tuple(sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py")))


@cache
def tree(path: Path) -> ast.Module:
    """Parsed."""
    return ast.parse(path.read_text())


def folders() -> Iterator[Folder]:
    """Every folder with modules, migrations aside."""
    for layer in LAYERS:
        for folder in sorted({path.parent for path in (ROOT / layer).rglob("*.py")}):
            if "migrations" in folder.parts:
                continue
            init = folder / "__init__.py"
            sentence = (ast.get_docstring(tree(init)) or "").split("\n")[0] if init.exists() else ""
            own = sorted(path for path in folder.glob("*.py") if path.stem not in ("__init__", "__main__"))
            modules = tuple((path.stem, len(path.read_text().splitlines())) for path in own)
            yield Folder(str(folder.relative_to(ROOT)), sentence, modules)


def table() -> str:
    """Markdown: folders, what they are, their modules and lines."""
    lines = ["| folder | what it holds | modules | lines |", "|---|---|---|---|"]
    for folder in folders():
        names = ", ".join(name for name, _ in folder.modules)
        count = sum(lines for _, lines in folder.modules)
        lines.append(f"| `{folder.name}/` | {folder.sentence} | {names} | {count} |")
    return "\n".join(lines)


def without_lines(table: str) -> str:
    """The table without its last column, which every change of the code would change."""
    return "\n".join(row.rsplit("|", 2)[0] for row in table.splitlines())


def comments() -> Iterator[tuple[Path, int, str]]:
    """Blocks of comments on lines of their own: file, line, text."""
    for path in files():
        block: list[str] = []
        begun = last = 0
        for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
            alone = token.type == tokenize.COMMENT and not token.line[: token.start[1]].strip()
            if not alone:
                continue
            if block and token.start[0] != last + 1:
                yield path, begun, " ".join(block)
                block = []
            if not block:
                begun = token.start[0]
            block.append(token.string.lstrip("# "))
            last = token.start[0]
        if block:
            yield path, begun, " ".join(block)


def dangling() -> list[str]:
    """Comments that begin with a clause whose subject is missing."""
    return [
        f"{path.relative_to(ROOT)}:{line}: {text[:80]}"
        for path, line, text in comments()
        if _DANGLING.match(text)
    ]


def gerunds() -> list[str]:
    """Modules that are called by what they do instead of what they are."""
    return [
        str(path.relative_to(ROOT))
        for path in files()
        if _GERUND.match(path.stem) and path.stem not in _NOUNS
    ]


def two_meanings() -> list[str]:
    """Public classes of one name in several modules."""
    places = defaultdict(list)
    for path in files():
        for node in tree(path).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(str(path.relative_to(ROOT)))
    return [f"{name}: {', '.join(where)}" for name, where in sorted(places.items()) if len(where) > 1]


def private_names() -> list[str]:
    """Private modules and names of other packages that are imported outside of service/server."""
    found = []
    for path in files():
        if "service/server" in str(path):
            continue
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            found += [
                f"{path.relative_to(ROOT)}:{node.lineno}: {name}"
                for name in names
                if name.split(".")[0] not in _OURS | {"__future__"}
                and any(part.startswith("_") and not part.startswith("__") for part in name.split(".")[1:])
            ]
    return found


def long_modules(most: int) -> list[str]:
    """Modules of more lines than that."""
    return [
        f"{folder.name}/{name}.py: {lines}"
        for folder in folders()
        for name, lines in folder.modules
        if lines > most
    ]


def main() -> int:
    """Prints what is found, and all of it with --verbose."""
    if "--write" in sys.argv:
        text = DOCUMENT.read_text()
        before, rest = text.split(BEGIN)
        DOCUMENT.write_text(f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.split(END)[1]}")
    every = list(comments())
    shown = {
        f"comments that begin with a dangling clause, of {len(every)}": dangling(),
        "gerund modules": gerunds(),
        "public classes with two meanings": two_meanings(),
        "private names of other packages outside of service/server": private_names(),
        "modules over 300 lines": long_modules(300),
        "modules over 400 lines": long_modules(400),
        "folders with more than 12 modules": [one.name for one in folders() if len(one.modules) > 12],
    }
    for what, found in shown.items():
        print(f"{len(found):5}  {what}")
        if "--verbose" in sys.argv:
            print(*(f"         {one}" for one in found), sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

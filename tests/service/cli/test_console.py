"""Output of commands on a terminal and elsewhere."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HOSTILE = "\x1b]0;owned\x07\x9b31m[red]"


def on_terminal(home: Path, *arguments: str) -> str:
    """Return what the command prints on a terminal. It must succeed."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [str(Path(sys.executable).with_name("topwork")), *arguments],
        env={**os.environ, "TOPWORK_HOME": str(home), "TERM": "xterm-256color", "COLUMNS": "200"},
        stdin=follower,
        stdout=follower,
        stderr=follower,
    )
    os.close(follower)
    with os.fdopen(leader, "rb") as terminal:
        printed = b"".join(_parts(terminal.fileno()))
    assert process.wait(60) == 0, printed
    return printed.decode()


def _parts(descriptor: int) -> Iterator[bytes]:
    while True:
        try:
            part = os.read(descriptor, 65_536)
        except OSError:  # Linux reports the end of a terminal as EIO
            return
        if not part:
            return
        yield part


def in_pipe(home: Path, *arguments: str) -> str:
    """Return what the command prints into a pipe. It must succeed."""
    done = subprocess.run(
        [str(Path(sys.executable).with_name("topwork")), *arguments],
        env={**os.environ, "TOPWORK_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with one tenant, who has one key with a hostile note."""
    home = tmp_path_factory.mktemp("home")
    in_pipe(home, "migrate")
    in_pipe(home, "tenants", "create", "acme")
    in_pipe(home, "keys", "create", "acme", "--note", HOSTILE)
    return home


def test_lists_are_tables_on_a_terminal_only(home: Path) -> None:
    assert "│ acme" in on_terminal(home, "tenants", "list")
    (line,) = in_pipe(home, "tenants", "list").splitlines()
    assert json.loads(line)["name"] == "acme"


def test_records_are_coloured_on_a_terminal_only(home: Path) -> None:
    quotas = '{"max_adapters": 3}'
    shown = on_terminal(home, "tenants", "quotas", "acme", quotas)
    assert "\x1b[" in shown
    assert len(shown.splitlines()) > 3
    (line,) = in_pipe(home, "tenants", "quotas", "acme", quotas).splitlines()
    assert json.loads(line)["quotas"]["max_adapters"] == 3


def test_control_characters_do_not_reach_the_terminal(home: Path) -> None:
    (line,) = in_pipe(home, "keys", "list", "acme").splitlines()
    key = json.loads(line)
    assert key["note"] == HOSTILE
    for shown in (
        on_terminal(home, "keys", "list", "acme"),
        on_terminal(home, "keys", "revoke", "acme", key["id"]),
    ):
        assert "owned" in shown
        assert "[red]" in shown
        assert not {"\x07", "\x9b"} & set(shown)
        assert "\x1b]" not in shown


def test_help_has_colours_on_a_terminal_only(home: Path) -> None:
    assert "╭" in on_terminal(home, "keys", "create", "--help")
    assert in_pipe(home, "keys", "create", "--help").isascii()


def test_help_imports_nothing_slow() -> None:
    """`topwork --help` and the start of `topwork serve` stay fast."""
    program = "import sys; import service.cli.main as m; m.main(['--help']); " + (
        "print([name for name in ('rich', 'pydantic', 'numpy', 'service.settings') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"

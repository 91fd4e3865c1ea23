"""Programs as children that end with this process."""

from __future__ import annotations

import os
import pwd
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path


class NotInstalled(RuntimeError):
    """A program is missing; the message names the package to install."""


def bound(sign: signal.Signals = signal.SIGTERM) -> list[str]:
    """The start of a command that gets the signal when the thread that started it ends, even by SIGKILL."""
    return ["setpriv", f"--pdeathsig={sign.name.removeprefix('SIG')}"]


def unprivileged() -> tuple[list[str], pwd.struct_passwd]:
    """The start of a command that refuses root, and the user that it runs as."""
    if os.geteuid() != 0:
        return [], pwd.getpwuid(os.geteuid())
    for name in ("postgres", "nobody"):
        try:
            return ["setpriv", f"--reuid={name}", "--clear-groups", "--regid=nogroup"], pwd.getpwnam(name)
        except KeyError:
            continue
    raise NotInstalled("there is no user without privileges")


def launch(
    command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start a command in a session of its own, which Ctrl-C does not reach. `log`: what it writes."""
    with log.open("ab") as stream:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
            env={**os.environ, **(environment or {})},
        )

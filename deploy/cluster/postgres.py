"""A PostgreSQL cluster in a folder of its own, on a socket there."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType

from deploy.cluster.processes import NotInstalled, bound, launch, unprivileged

_START_SECONDS = 60.0


class Postgres:
    """A running server with no data; a context manager, which deletes it. `url`: its database `postgres`."""

    def __init__(self, *options: str, sync: bool = True) -> None:
        """Returns once it takes connections.

        `options`: settings as `name=value`. `sync`: whether it survives a crash of the machine. Raises
        NotInstalled.
        """
        programs = find_postgres()
        prefix, user = unprivileged()
        # The server may run as another user, which may not enter the folders of this one.
        self._home = Path(tempfile.mkdtemp(prefix="topwork-postgres-"))
        os.chown(self._home, user.pw_uid, user.pw_gid)
        data = self._home / "data"
        self.url = f"postgresql+psycopg://postgres@/postgres?host={self._home}"
        try:
            make = ["initdb", "-D", str(data), "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-sync"]
            made = subprocess.run(
                [*prefix, str(programs / make[0]), *make[1:]], cwd=self._home, capture_output=True, text=True
            )
            assert made.returncode == 0, made.stdout + made.stderr
            settings = [
                f"unix_socket_directories={self._home}",
                "listen_addresses=",
                *([] if sync else ["fsync=off"]),
                *options,
            ]
            self._command = [
                *(prefix or ["setpriv"]),
                *bound(signal.SIGQUIT)[1:],
                str(programs / "postgres"),
                *("-D", str(data)),
                *(word for setting in settings for word in ("-c", setting)),
            ]
            self._probe = [str(programs / "pg_isready"), "-q", "-h", str(self._home)]
            self.start()
        except BaseException:
            self._delete()
            raise

    def start(self) -> None:
        """Start the server, also again after a crash; returns once it takes connections."""
        self.process = launch(self._command, self._home / "log")
        end = time.monotonic() + _START_SECONDS
        while subprocess.run(self._probe).returncode != 0:
            ended = self.process.poll() is not None or time.monotonic() > end
            assert not ended, (self._home / "log").read_text()
            time.sleep(0.05)

    def crash(self) -> None:
        """End the server at once, which leaves its files as a crash does."""
        self.process.send_signal(signal.SIGQUIT)
        self.process.wait(60)

    def _delete(self) -> None:
        process = getattr(self, "process", None)
        if process is not None and process.poll() is None:
            self.crash()
        shutil.rmtree(self._home)

    def __enter__(self) -> Postgres:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._delete()


def find_postgres() -> Path:
    """The folder of PostgreSQL's programs. Raises NotInstalled."""
    found = shutil.which("initdb")
    if found:
        return Path(found).resolve().parent
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    if not installed:
        raise NotInstalled("postgresql")
    return installed[-1]

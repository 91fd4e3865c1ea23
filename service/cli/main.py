"""The command `topwork`: its commands, and how it reports errors."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import typer
from typer.main import get_command

from service.cli import console, keys, plan, server, storage, tenants

app = console.command_group("A model server that adapts to the labelled examples of each tenant.")
app.command()(server.serve)
app.command()(server.worker)
app.add_typer(tenants.app, name="tenants")
app.add_typer(keys.app, name="keys")
app.command()(storage.backup)
app.command()(storage.restore)
app.command()(storage.doctor)
app.command()(storage.migrate)
app.command()(plan.plan)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return the exit status: 2 if it was called wrongly, 1 if it failed."""
    # Files that a command writes are readable by their owner only.
    os.umask(0o077)
    try:
        return get_command(app)(arguments, prog_name="topwork", standalone_mode=False) or 0
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        called = context.command_path if context else "topwork"
        message = " ".join(error.format_message().split()).rstrip(".")
        print(f"{called}: {message}; see `{called} --help`", file=sys.stderr)
        return error.exit_code
    except Exception as error:
        from service.server.process import complain

        complain(error)
        return 1


if __name__ == "__main__":
    sys.exit(main())

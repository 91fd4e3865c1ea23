"""`topwork backup`, `restore`, `doctor` and `migrate`, which work on the database and the store directly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.cli.console import show

if TYPE_CHECKING:
    from adapters.maintenance.restore import RestoredBackup
    from adapters.registry.database import Database
    from adapters.storage.artifact import Store
    from models.backbone import Backbone
    from service.settings import Settings


def backup(
    folder: Annotated[
        Path, typer.Argument(help="Where to make the folder of this backup.", show_default=False)
    ],
) -> None:
    """Copy the database and the artifacts into a new folder. Services may be running."""
    from adapters.maintenance.backup import backup as write_backup
    from service.settings import read_settings

    with _storage(read_settings()) as (database, store):
        path, manifest = write_backup(database, store, folder.expanduser().absolute())
    show({"backup": str(path), **asdict(manifest)})


def restore(
    backup: Annotated[Path, typer.Argument(help="The folder of one backup.", show_default=False)],
    replace: Annotated[
        bool, typer.Option("--replace", help="Restore over a database that has tenants or adapters.")
    ] = False,
    old: Annotated[
        bool,
        typer.Option(
            "--old",
            help="Restore a backup older than the record of erasures; erased data may come back.",
        ),
    ] = False,
) -> None:
    """Replace the database and the artifacts by those of a backup. Services may be running."""
    from adapters.maintenance.restore import restore as restore_backup
    from adapters.registry.database import Database
    from adapters.storage.open import open_store
    from service.settings import read_settings

    settings = read_settings()
    settings.make_home()
    store = open_store(settings.store, settings.store_options)
    database = Database(settings.database)
    try:
        restored = restore_backup(backup.expanduser().absolute(), database, store, replace=replace, old=old)
    finally:
        database.close()
    show(_report(restored))


def doctor(
    repair: Annotated[bool, typer.Option("--repair", help="Repair what can be repaired.")] = False,
) -> None:
    """Look for damage.

    Prints one line of JSON for each finding, then a summary. The exit status is 1 if damage is left.
    """
    from adapters.maintenance.doctor import Doctor
    from service.settings import read_settings

    settings = read_settings()
    with _storage(settings) as (database, store), ExitStack() as stack:
        examination = Doctor(
            database, store, lambda name: _open_backbone(settings, name, stack), repair=repair
        )
        for finding in examination.findings():
            show(asdict(finding))
        summary = examination.summary()
    show(asdict(summary))
    if summary.left:
        raise typer.Exit(1)


def migrate() -> None:
    """Update the tables of an earlier release to those of this release."""
    from adapters.registry.database import Database
    from service.settings import read_settings

    settings = read_settings()
    settings.make_home()
    database = Database(settings.database)
    try:
        before = database.revision
        database.migrate()
        show({"before": before, "schema": database.revision})
    finally:
        database.close()


@contextmanager
def _storage(settings: Settings) -> Iterator[tuple[Database, Store]]:
    """Yield the database, which must have this release's tables, and its store."""
    from adapters.registry.database import Database
    from adapters.registry.identity import Identity
    from adapters.storage.open import open_store

    database = Database(settings.database)
    try:
        database.require_current()
        store = open_store(settings.store, settings.store_options)
        Identity(database).check(store)
        yield database, store
    finally:
        database.close()


def _report(restored: RestoredBackup) -> dict[str, Any]:
    again = restored.replayed
    return {
        "restored": restored.manifest.created_at,
        "adapters": restored.adapters,
        "artifacts": restored.artifacts,
        "replaced_adapters": restored.replaced,
        "erased_again": {
            "tenants": again.tenants,
            "adapters": again.adapters,
            "examples": again.examples,
            "jobs": again.jobs,
        },
        # Adapters whose live version was fitted on erased data: adapt again, or promote an older version.
        "without_live_version": [
            {"tenant": tenant, "adapter": name} for tenant, name in sorted(again.without_live)
        ],
    }


def _open_backbone(settings: Settings, name: str, stack: ExitStack) -> Backbone | None:
    """Return the backbone, which closes with the stack, or None if it is not exported here."""
    from models.backbone import Backbone
    from models.sources.source import entry_of
    from models.spec import UnknownBackbone
    from models.store.exports import find

    try:
        folder = find(entry_of(name, settings.backbones))
    except UnknownBackbone:
        # The settings of the service that it was embedded by had a short name for it.
        folder = None
    if folder is None:
        return None
    opened = Backbone.open(
        folder, device=settings.device, threads=settings.usable_threads, limits=settings.input_limits
    )
    stack.callback(opened.close)
    return opened

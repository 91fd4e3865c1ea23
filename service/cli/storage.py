"""`topwork backup`, `restore`, `doctor`, `migrate`: straight on database and store, serving or not."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adapters.maintenance.restore import RestoredBackup
    from adapters.registry.database import Database
    from adapters.storage.artifact import Store
    from models.backbone import Backbone
    from service.settings import Settings

COMMANDS = ("backup", "restore", "doctor", "migrate")


def add_commands(commands: Any) -> None:
    """Add the four commands to the command line."""
    backup = commands.add_parser("backup", help="write database and artifacts into a folder")
    backup.add_argument("folder", type=Path, help="gets a new folder for this backup")
    restore = commands.add_parser("restore", help="put a backup in the place of database and artifacts")
    restore.add_argument("backup", type=Path, help="the folder of one backup")
    restore.add_argument(
        "--replace", action="store_true", help="though there are tenants or adapters already"
    )
    restore.add_argument(
        "--old", action="store_true", help="though erasures are not remembered for as long as it is old"
    )
    doctor = commands.add_parser("doctor", help="look for damage, and report each in a line of JSON")
    doctor.add_argument("--repair", action="store_true", help="repair what can be")
    commands.add_parser("migrate", help="bring an earlier release's tables to this release's")


def run(options: argparse.Namespace) -> int:
    """Run the command and return the exit status. Raises our own errors, which say what is wrong."""
    from service.settings import Settings

    settings = Settings()
    match options.command:
        case "migrate":
            return _migrate(settings)
        case "restore":
            return _restore(settings, options)
    with _storage(settings) as (database, store):
        if options.command == "backup":
            return _backup(database, store, options.folder)
        return _doctor(settings, database, store, options.repair)


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


def _backup(database: Database, store: Store, folder: Path) -> int:
    from adapters.maintenance.backup import backup

    path, manifest = backup(database, store, folder.expanduser().absolute())
    print(json.dumps({"backup": str(path), **asdict(manifest)}))
    return 0


def _restore(settings: Settings, options: argparse.Namespace) -> int:
    from adapters.maintenance.restore import restore
    from adapters.registry.database import Database
    from adapters.storage.open import open_store

    settings.make_home()
    backup = options.backup.expanduser().absolute()
    store = open_store(settings.store, settings.store_options)
    database = Database(settings.database)
    try:
        restored = restore(backup, database, store, replace=options.replace, old=options.old)
    finally:
        database.close()
    print(json.dumps(_report(restored)))
    return 0


def _migrate(settings: Settings) -> int:
    from adapters.registry.database import Database

    settings.make_home()
    database = Database(settings.database)
    try:
        before = database.revision
        database.migrate()
        print(json.dumps({"before": before, "schema": database.revision}))
    finally:
        database.close()
    return 0


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


def _doctor(settings: Settings, database: Database, store: Store, repair: bool) -> int:
    from adapters.maintenance.doctor import Doctor

    with ExitStack() as stack:

        def open_backbone(name: str) -> Backbone | None:
            from models.backbone import Backbone
            from models.model_store import find
            from models.preprocess.limits import InputLimits

            folder = find(name)
            if folder is None:
                return None
            limits = InputLimits(
                max_image_bytes=settings.max_image_bytes,
                max_pixels=settings.max_image_pixels,
                max_text_chars=settings.max_text_chars,
            )
            opened = Backbone.open(
                folder, device=settings.device, threads=settings.usable_threads, limits=limits
            )
            stack.callback(opened.close)
            return opened

        doctor = Doctor(database, store, open_backbone, repair=repair)
        for finding in doctor.findings():
            print(json.dumps(asdict(finding)), flush=True)
        summary = doctor.summary()
    print(json.dumps(asdict(summary)))
    return 1 if summary.left else 0

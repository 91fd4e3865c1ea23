"""Databases at an earlier revision of the schema."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config

import adapters.registry.migrations
from adapters.registry.database import Database

LAST = "0007"  # the newest revision but one


def at_revision(url: str, revision: str) -> None:
    """Make the tables of an earlier release in an empty database."""
    config = Config()
    config.set_main_option("script_location", str(Path(adapters.registry.migrations.__file__).parent))
    database = Database(url)
    with database.writing() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
    database.close()

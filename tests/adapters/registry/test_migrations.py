from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import inspect

import adapters.registry.migrations
from adapters.registry.database import Database
from adapters.registry.errors import RegistryTooNew, UnknownAdapter
from adapters.registry.migrations import HEAD
from adapters.registry.registry import Registry
from adapters.registry.schema import metadata
from adapters.storage.artifact import Artifact

MIGRATE = """
import sys
from adapters.registry.registry import Registry
registry = Registry(sys.argv[1])
registry.migrate()
assert registry.adapters("acme") == []
registry.close()
print("alembic" in sys.modules)
"""


def migrate(url: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", MIGRATE, url], capture_output=True, text=True)


def test_the_head_is_the_newest_revision_and_there_is_one() -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(adapters.registry.migrations.__file__).parent))
    assert ScriptDirectory.from_config(config).get_heads() == [HEAD]


def test_the_migrated_tables_are_the_schemas(registry: Registry, registry_url: str) -> None:
    database = Database(registry_url)
    with database.reading() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []
    database.close()


def test_a_second_start_changes_nothing_and_does_not_import_alembic(registry_url: str) -> None:
    first, second = migrate(registry_url), migrate(registry_url)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert (first.stdout.strip(), second.stdout.strip()) == ("True", "False")


def test_processes_that_start_at_once_migrate_once(registry_url: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        runs = list(pool.map(migrate, [registry_url] * 4))
    assert [run.returncode for run in runs] == [0] * 4, "".join(run.stderr for run in runs)


def test_threads_that_start_at_once_migrate_once(registry_url: str) -> None:
    def start(number: int) -> None:
        registry = Registry(registry_url)
        registry.migrate()
        with pytest.raises(UnknownAdapter):
            registry.adapter("acme", "pets")
        registry.close()

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(start, range(6)))


def test_a_failed_migration_leaves_nothing(registry_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise KeyboardInterrupt

    registry = Registry(registry_url)
    with monkeypatch.context() as patch:
        patch.setattr("alembic.operations.Operations.create_index", fail)
        with pytest.raises(KeyboardInterrupt):
            registry.migrate()
    database = Database(registry_url)
    with database.reading() as connection:
        assert MigrationContext.configure(connection).get_current_revision() is None
        assert inspect(connection).get_table_names() == []
    database.close()
    registry.migrate()
    assert registry.adapters("acme") == []
    registry.close()


def test_versions_of_the_first_release_are_kept(registry_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry(registry_url)
    with monkeypatch.context() as patch:
        patch.setattr("adapters.registry.database.HEAD", "0001")
        registry.migrate()
    at = "0" if registry_url.startswith("sqlite") else "now()"
    database = Database(registry_url)
    with database.writing() as connection:
        for statement in (
            "INSERT INTO adapters VALUES ('u', 'acme', 'pets', 'lite0', 'f', 'image', 'classification', "
            f"true, 1, 2, 1, 1, 0, {at})",
            "INSERT INTO artifacts (id, adapter_uid, sha256, nonce, length) VALUES (7, 'u', 'a', 'b', 3)",
            "INSERT INTO versions VALUES "
            f"('u', 1, 1, 'linear_probe', 'lite0', 'f', 7, NULL, '{{}}', 2, {at})",
        ):
            connection.exec_driver_sql(statement)
    database.close()
    registry.migrate()
    alias = registry.resolve("acme", "pets")
    assert (alias.version, alias.artifact, alias.network) == (1, Artifact("a", 3, "b"), None)
    assert registry.jobs.jobs("acme") == []
    registry.close()


def test_jobs_of_the_release_before_are_kept_and_its_processes_go_on_submitting(
    registry_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry(registry_url)
    with monkeypatch.context() as patch:
        patch.setattr("adapters.registry.database.HEAD", "0002")
        registry.migrate()
    at = "0" if registry_url.startswith("sqlite") else "now()"
    database = Database(registry_url)

    def insert(number: int) -> None:
        with database.writing() as connection:
            connection.exec_driver_sql(
                "INSERT INTO jobs (id, tenant, adapter_uid, adapter, kind, state, request, attempt, "
                f"cancel_requested, created_at) VALUES ('{number}', 'acme', 'u', 'pets', 'fine_tune', "
                f"'queued', '{{}}', {number}, false, {at})"
            )

    with database.writing() as connection:
        connection.exec_driver_sql(
            "INSERT INTO adapters VALUES ('u', 'acme', 'pets', 'lite0', 'f', 'image', 'classification', "
            f"true, 1, 1, NULL, 1, 0, {at})"
        )
    insert(1)
    registry.migrate()
    insert(2)
    database.close()
    assert [(job.id, job.attempt, job.released) for job in registry.jobs.jobs("acme")] == [
        ("2", 2, 0),
        ("1", 1, 0),
    ]
    registry.close()


def test_examples_of_the_release_before_are_sampled_and_its_processes_go_on_adding(
    registry_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry(registry_url)
    with monkeypatch.context() as patch:
        patch.setattr("adapters.registry.database.HEAD", "0006")
        registry.migrate()
    at = "0" if registry_url.startswith("sqlite") else "now()"
    database = Database(registry_url)

    def insert(*names: str) -> None:
        with database.writing() as connection:
            for name in names:
                connection.exec_driver_sql(
                    "INSERT INTO examples (adapter_uid, id, digest, target, segment_id, row, inputs_id, "
                    f"first_revision, created_at) VALUES ('u', '{name}', 'd', '5.0', 7, 0, NULL, 1, {at})"
                )

    def create(uid: str) -> None:
        with database.writing() as connection:
            connection.exec_driver_sql(
                "INSERT INTO adapters (uid, tenant, name, backbone, fingerprint, kind, task, keep_inputs, "
                "revision, next_version, live, epoch, examples, created_at) VALUES "
                f"('{uid}', 'acme', 'pets {uid}', 'lite0', 'f', 'image', 'regression', true, 1, 1, NULL, 1, "
                f"2, {at})"
            )

    create("u")
    with database.writing() as connection:
        connection.exec_driver_sql(
            "INSERT INTO artifacts (id, adapter_uid, sha256, nonce, length) VALUES (7, 'u', 'a', 'b', 3)"
        )
    insert("a", "b")
    registry.migrate()
    insert("c")
    create("v")
    database.close()
    for uid in ("u", "v"):
        adapter = registry.adapter("acme", f"pets {uid}")
        assert (adapter.answer_accuracy, adapter.weights) == (0.95, "none")
    found = registry.examples("u")
    assert [(one.id, one.target, one.group, one.sampled) for one in found] == [
        (name, 5.0, None, True) for name in "abc"
    ]
    registry.close()


def test_nothing_of_the_release_before_is_set_aside_or_held(
    registry_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry(registry_url)
    with monkeypatch.context() as patch:
        patch.setattr("adapters.registry.database.HEAD", "0007")
        registry.migrate()
    at = "0" if registry_url.startswith("sqlite") else "now()"
    database = Database(registry_url)
    statements = (
        "INSERT INTO adapters (uid, tenant, name, backbone, fingerprint, kind, task, keep_inputs, revision, "
        "next_version, live, epoch, examples, created_at) VALUES "
        f"('u', 'acme', 'pets', 'lite0', 'f', 'image', 'classification', true, 1, 1, 1, 1, 1, {at})",
        "INSERT INTO artifacts (id, adapter_uid, sha256, nonce, length) VALUES (7, 'u', 'a', 'b', 3)",
        "INSERT INTO versions (adapter_uid, number, revision, method, backbone, fingerprint, artifact_id, "
        f"report, labels, created_at) VALUES ('u', 1, 1, 'linear_probe', 'lite0', 'f', 7, '{{}}', 2, {at})",
        "INSERT INTO examples (adapter_uid, id, digest, target, segment_id, row, first_revision, created_at) "
        f"VALUES ('u', 'a', 'd', '5.0', 7, 0, 1, {at})",
    )
    with database.writing() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)
    registry.migrate()
    # A process of the release before goes on adding and promoting.
    with database.writing() as connection:
        connection.exec_driver_sql(statements[-1].replace("'a'", "'b'"))
        connection.exec_driver_sql("UPDATE adapters SET live = 1, examples = 2")
    database.close()
    adapter = registry.adapter("acme", "pets")
    assert (adapter.standing, adapter.restored_at) == ((1, None), None)
    assert [(one.id, one.excluded) for one in registry.examples("u")] == [("a", False), ("b", False)]
    registry.close()


def test_changes_are_numbered_in_order(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections that keep numbers would give them out late, after higher ones."""
    registry = Registry(postgres_url)
    with monkeypatch.context() as patch:
        patch.setattr("adapters.registry.database.HEAD", "0009")
        registry.migrate()
    database = Database(postgres_url)
    with database.writing() as connection:
        connection.exec_driver_sql("ALTER SEQUENCE changes_epoch_seq CACHE 20")
    registry.migrate()
    with database.reading() as connection:
        query = "SELECT seqcache FROM pg_sequence WHERE seqrelid = 'changes_epoch_seq'::regclass"
        assert connection.exec_driver_sql(query).scalar_one() == 1
    database.close()
    registry.close()


def test_a_newer_database_is_refused_and_left_alone(registry: Registry, registry_url: str) -> None:
    database = Database(registry_url)
    with database.writing() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(RegistryTooNew, match="9999"):
        registry.migrate()
    with database.reading() as connection:
        assert connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar_one() == "9999"
    database.close()


def test_no_label_of_the_release_before_has_a_description_or_a_cost(
    registry_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry(registry_url)
    with monkeypatch.context() as patch:
        patch.setattr("adapters.registry.database.HEAD", "0010")
        registry.migrate()
    at = "0" if registry_url.startswith("sqlite") else "now()"
    database = Database(registry_url)

    def create(name: str) -> None:
        with database.writing() as connection:
            connection.exec_driver_sql(
                "INSERT INTO adapters (uid, tenant, name, backbone, fingerprint, kind, task, keep_inputs, "
                f"revision, next_version, epoch, examples, created_at) VALUES ('{name}', 'acme', '{name}', "
                f"'lite0', 'f', 'image', 'classification', true, 1, 1, 1, 0, {at})"
            )

    create("before")
    registry.migrate()
    # A process of the release before goes on creating adapters.
    create("after")
    database.close()
    for name in ("before", "after"):
        adapter = registry.adapter("acme", name)
        assert (adapter.meanings, adapter.costs) == ({}, {})
    registry.close()

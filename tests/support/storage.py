"""Real databases and a real S3 endpoint: each test gets a database, a folder or a bucket of its own."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest
from sqlalchemy import create_engine, make_url, text

from adapters.registry.registry import Registry
from adapters.storage.artifact import Store
from adapters.storage.open import open_store
from deploy.cluster.bucket import S3Server, make_bucket, store_options
from deploy.cluster.postgres import Postgres
from deploy.cluster.processes import NotInstalled, bound, unprivileged
from tests.support.conditions import until

_numbers = itertools.count(1)


def unavailable(component: str, reason: str) -> NoReturn:
    """Skip what needs a component that is not installed, or fail where TOPWORK_TEST_REQUIRE names it."""
    if component in os.environ.get("TOPWORK_TEST_REQUIRE", "").split(","):
        pytest.fail(f"{component} is required and missing: {reason}")
    pytest.skip(f"{component} is missing: {reason}")


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """URL of a private PostgreSQL cluster, on a socket."""
    try:
        server = Postgres("max_connections=200", "shared_preload_libraries=pg_stat_statements", sync=False)
    except NotInstalled as error:
        unavailable("postgres", f"{error} is not installed")
    with server:
        yield server.url


@pytest.fixture
def postgres_url(postgres_server: str) -> str:
    """URL that leads to an empty schema."""
    return new_schema(postgres_server)


def new_schema(postgres_server: str) -> str:
    """URL that leads to an empty schema, which is made in a thousandth of a database's time."""
    schema = f"topwork_{next(_numbers)}"
    engine = create_engine(postgres_server)
    with engine.begin() as connection:
        connection.execute(text(f"CREATE SCHEMA {schema}"))
    engine.dispose()
    return f"{postgres_server}&options=-csearch_path%3D{schema}"


def new_database(postgres_server: str) -> str:
    """URL of an empty database of its own."""
    name = f"topwork_{next(_numbers)}"
    engine = create_engine(postgres_server, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return make_url(postgres_server).set(database=name).render_as_string(hide_password=False)


SERVER_CONNECTIONS = 4  # of the pooler, shared by all of its clients


@pytest.fixture
def pooled_url(postgres_server: str) -> Iterator[str]:
    """URL that leads to an empty database through PgBouncer in transaction mode."""
    program = shutil.which("pgbouncer", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
    if program is None:
        unavailable("pgbouncer", "no pgbouncer on this machine")
    prefix, user = unprivileged()
    database = make_url(new_database(postgres_server))
    with tempfile.TemporaryDirectory(prefix="topwork-pgbouncer-") as folder:
        os.chown(folder, user.pw_uid, user.pw_gid)
        config = Path(folder) / "pgbouncer.ini"
        config.write_text(
            f"""[databases]
            {database.database} = host={database.query["host"]} user=postgres
            [pgbouncer]
            pool_mode = transaction
            default_pool_size = {SERVER_CONNECTIONS}
            auth_type = any
            unix_socket_dir = {folder}
            logfile = {folder}/log
            """
        )
        # It ends with the tests, even if they are killed.
        command = [*(prefix or ["setpriv"]), *bound()[1:], program, "-q", str(config)]
        with subprocess.Popen(command) as process:
            try:
                until((Path(folder) / ".s.PGSQL.6432").exists)
                pooled = database.update_query_dict({"host": folder, "port": "6432"})
                yield pooled.render_as_string(hide_password=False)
            finally:
                process.terminate()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Address of a private S3 endpoint."""
    try:
        server = S3Server()
    except ImportError as error:
        unavailable("s3", str(error))
    with server:
        yield server.url


@pytest.fixture
def s3_options(s3_server: str) -> dict[str, str]:
    """The options with which `open_store` reaches the endpoint."""
    return store_options(s3_server)


@pytest.fixture
def s3_url(s3_options: dict[str, str]) -> str:
    """URL of an empty bucket, with a prefix."""
    return new_bucket(s3_options)


def new_bucket(s3_options: dict[str, str]) -> str:
    """URL of an empty bucket, with a prefix."""
    return make_bucket(s3_options, f"topwork-{next(_numbers)}")


@pytest.fixture(params=["sqlite", "postgres"])
def registry_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of an empty database, once of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'topwork.db'}"
    url: str = request.getfixturevalue("postgres_url")
    return url


@pytest.fixture
def registry(registry_url: str) -> Iterator[Registry]:
    """A registry with current tables, once in each kind of database."""
    opened = Registry(registry_url)
    opened.migrate()
    yield opened
    opened.close()


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty store, once in a folder and once in a bucket."""
    if request.param == "local":
        return open_store(str(tmp_path / "artifacts"))
    return open_store(request.getfixturevalue("s3_url"), request.getfixturevalue("s3_options"))

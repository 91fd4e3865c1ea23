"""Real databases and a real S3 endpoint: each test gets a database, a folder or a bucket of its own."""

from __future__ import annotations

import itertools
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine, make_url, text

from adapters.registry.registry import Registry
from adapters.storage.artifact import Store
from adapters.storage.open import open_store
from tests.support.conditions import until

_numbers = itertools.count(1)


def unavailable(component: str, reason: str) -> None:
    """Skip what needs a component that is not installed, or fail where TOPWORK_TEST_REQUIRE names it."""
    if component in os.environ.get("TOPWORK_TEST_REQUIRE", "").split(","):
        pytest.fail(f"{component} is required and missing: {reason}")
    pytest.skip(f"{component} is missing: {reason}")


def _postgres_programs() -> Path | None:
    found = shutil.which("initdb")
    if found:
        return Path(found).parent
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    return installed[-1] if installed else None


def _unprivileged() -> tuple[list[str], pwd.struct_passwd]:
    """How to run a program that refuses root, and as whom."""
    if os.geteuid() != 0:
        return [], pwd.getpwuid(os.geteuid())
    for name in ("postgres", "nobody"):
        try:
            return ["setpriv", f"--reuid={name}", "--clear-groups", "--regid=nogroup"], pwd.getpwnam(name)
        except KeyError:
            continue
    raise AssertionError("no unprivileged user")


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """URL of a private PostgreSQL cluster, on a socket."""
    programs = _postgres_programs()
    if programs is None:
        unavailable("postgres", "no initdb on this machine")
    assert programs is not None
    prefix, user = _unprivileged()
    # Only its owner may enter pytest's folder, and the cluster runs as another user.
    home = Path(tempfile.mkdtemp(prefix="topwork-postgres-"))
    os.chown(home, user.pw_uid, user.pw_gid)
    data = home / "data"

    def run(*command: str) -> None:
        done = subprocess.run(
            [*prefix, str(programs / command[0]), *command[1:]], cwd=home, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr

    try:
        run("initdb", "-D", str(data), "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-sync")
        options = (
            f"-c listen_addresses='' -c unix_socket_directories={home} -c fsync=off -c max_connections=200 "
            "-c shared_preload_libraries=pg_stat_statements"
        )
        run("pg_ctl", "-D", str(data), "-l", str(home / "log"), "-w", "-o", options, "start")
        try:
            yield f"postgresql+psycopg://postgres@/postgres?host={home}"
        finally:
            run("pg_ctl", "-D", str(data), "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(home)


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
    assert program is not None
    prefix, user = _unprivileged()
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
        with subprocess.Popen([*prefix, program, "-q", str(config)]) as process:
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
        from moto.server import ThreadedMotoServer
    except ImportError as error:
        unavailable("s3", str(error))
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
    finally:
        server.stop()


@pytest.fixture
def s3_options(s3_server: str) -> dict[str, str]:
    """The options with which `open_store` reaches the endpoint."""
    return {
        "endpoint": s3_server,
        "region": "us-east-1",
        "access_key_id": "test",
        "secret_access_key": "test",
    }


@pytest.fixture
def s3_url(s3_options: dict[str, str]) -> str:
    """URL of an empty bucket, with a prefix."""
    return new_bucket(s3_options)


def new_bucket(s3_options: dict[str, str]) -> str:
    """URL of an empty bucket, with a prefix."""
    import boto3

    bucket = f"topwork-{next(_numbers)}"
    client = boto3.client(
        "s3",
        endpoint_url=s3_options["endpoint"],
        region_name=s3_options["region"],
        aws_access_key_id=s3_options["access_key_id"],
        aws_secret_access_key=s3_options["secret_access_key"],
    )
    client.create_bucket(Bucket=bucket)
    client.close()
    return f"s3://{bucket}/artifacts"


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

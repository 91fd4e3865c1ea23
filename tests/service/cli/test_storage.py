"""`topwork backup`, `restore`, `doctor` and `migrate`, each in a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapters.registry.migrations import HEAD
from tests.support.adapters.adapter_stack import TENANT, says, taught, world
from tests.support.adapters.schema import LAST, at_revision
from tests.support.models.tiny_backbones import TEXT_NAME, install
from tests.support.service.commands import run_topwork

pytestmark = pytest.mark.anyio

INPUTS = [says("one", 90), says("two", 91)]


async def test_backup_restore_and_doctor(tmp_path: Path) -> None:
    home, folder = tmp_path / "home", tmp_path / "backups"
    home.mkdir()
    url = f"sqlite:///{home / 'topwork.db'}"
    async with world(home, url=url) as running:
        await running.adapt(taught())
        expected = await running.labels(INPUTS)
        (written,) = run_topwork(home, "backup", str(folder))
    assert [str(path) for path in folder.iterdir()] == [written["backup"]]
    assert written["form"] == "topwork.backup/1"
    assert (written["counts"]["examples"], written["artifacts"]) == (8, 4)

    (complaint,) = run_topwork(home, "restore", written["backup"], status=1)
    assert "--replace" in complaint["complaint"]
    assert len(complaint["complaint"].splitlines()) == 1
    (done,) = run_topwork(home, "restore", written["backup"], "--replace")
    assert (done["adapters"], done["replaced_adapters"], done["without_live_version"]) == (1, 1, [])

    fresh = tmp_path / "fresh"
    (done,) = run_topwork(fresh, "restore", written["backup"])
    assert (done["adapters"], done["replaced_adapters"], done["artifacts"]) == (1, 0, 4)
    whole = {"adapters": 1, "artifacts": 4, "findings": 0, "repaired": 0, "left": 0}
    (summary,) = run_topwork(fresh, "doctor")
    assert summary.items() >= whole.items()
    async with world(fresh, url=f"sqlite:///{fresh / 'topwork.db'}") as running:
        assert await running.labels(INPUTS) == expected
        version = running.registry.versions(running.registry.adapter(TENANT, "words").uid)[0]
    assert version.evidence is not None
    (path,) = (fresh / "artifacts").rglob(version.evidence.name)
    path.unlink()
    finding, summary = run_topwork(fresh, "doctor", status=1)
    assert finding == {
        "tenant": TENANT,
        "adapter": "words",
        "what": "evidence of version 1",
        "code": "missing_artifact",
        "detail": finding["detail"],
        "repaired": False,
    }
    assert (summary["findings"], summary["left"]) == (1, 1)
    finding, summary = run_topwork(fresh, "doctor", "--repair")
    assert (finding["repaired"], summary["repaired"], summary["left"]) == (True, 1, 0)
    assert len(run_topwork(fresh, "doctor")) == 1

    (complaint,) = run_topwork(fresh, "restore", str(folder), "--replace", status=1)
    assert "not a complete backup" in complaint["complaint"]


async def test_the_doctor_embeds_with_the_exported_backbone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "bentoml")
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path / "bentoml"))
    home = tmp_path / "home"
    home.mkdir()
    async with world(home, url=f"sqlite:///{home / 'topwork.db'}") as running:
        # The world knows the backbone under a name of its own.
        running.batchers[TEXT_NAME] = running.batchers["tiny-text"]
        await running.adapt(taught(), backbone=TEXT_NAME)
        example = running.registry.example(running.registry.adapter(TENANT, "words").uid, "one0")
        (path,) = (home / "artifacts").rglob(example.segment.name)
        path.write_bytes(path.read_bytes()[:-1])
        finding, summary = run_topwork(home, "doctor", "--repair")
        assert (finding["what"], finding["code"]) == ("embeddings of 8 examples", "corrupt_artifact")
        assert (finding["repaired"], summary["left"]) == (True, 0)
        running.check()


def test_an_earlier_releases_database_is_left_as_it_is(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    path = home / "topwork.db"
    at_revision(f"sqlite:///{path}", LAST)
    before, changed_at = path.read_bytes(), path.stat().st_mtime_ns
    lines = f"backup {tmp_path / 'backups'}", "doctor", f"keys list {TENANT}", "tenants list"
    for line in lines:
        (complaint,) = run_topwork(home, *line.split(), status=1)
        assert f"revision {LAST}" in complaint["complaint"]
        assert "topwork migrate" in complaint["complaint"]
        assert len(complaint["complaint"].splitlines()) == 1
        assert (path.read_bytes(), path.stat().st_mtime_ns) == (before, changed_at)
        assert [one.name for one in home.iterdir()] == ["topwork.db"]
    assert run_topwork(home, "migrate") == [{"before": LAST, "schema": HEAD}]
    assert run_topwork(home, "migrate") == [{"before": HEAD, "schema": HEAD}]
    run_topwork(home, "tenants", "create", TENANT)
    for line in lines:
        run_topwork(home, *line.split())


def test_a_command_makes_no_database(tmp_path: Path) -> None:
    (complaint,) = run_topwork(tmp_path / "home", "keys", "list", TENANT, status=1)
    assert "topwork migrate" in complaint["complaint"]
    assert list(tmp_path.iterdir()) == []


async def test_a_store_of_another_database_is_refused(tmp_path: Path) -> None:
    home, other = tmp_path / "home", tmp_path / "other"
    for one in (home, other):
        one.mkdir()
        async with world(one, url=f"sqlite:///{one / 'topwork.db'}") as running:
            await running.adapt(taught())
        run_topwork(one, "doctor")
    before = {path: path.read_bytes() for path in (home / "artifacts").rglob("*") if path.is_file()}
    mixed = {"TOPWORK_DATABASE_URL": f"sqlite:///{other / 'topwork.db'}"}
    for arguments in (("doctor", "--repair"), ("backup", str(tmp_path / "to"))):
        (complaint,) = run_topwork(home, *arguments, status=1, **mixed)
        assert "belongs to another database" in complaint["complaint"]
    assert {path: path.read_bytes() for path in (home / "artifacts").rglob("*") if path.is_file()} == before


async def test_what_commands_write_is_the_users_alone(tmp_path: Path) -> None:
    """In a home, too, that was there before and that others may read."""
    home, folder = tmp_path / "home", tmp_path / "backups"
    for one in (home, folder):
        one.mkdir(mode=0o755)
    run_topwork(home, "migrate")
    run_topwork(home, "backup", str(folder))
    written = [path for top in (home, folder) for path in top.rglob("*")]
    assert len(written) > 4
    assert [path for path in written if path.stat().st_mode & 0o077] == []

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from adapters.storage.artifact import (
    Artifact,
    CorruptArtifact,
    MissingArtifact,
    Store,
    StoredObject,
    StoreFull,
    StoreUnavailable,
)
from adapters.storage.local import LocalStore
from adapters.storage.open import open_store
from adapters.storage.sweeper import sweep

TENANT = "acme"
UID = "0" * 31 + "1"
OTHER = "0" * 31 + "2"


def files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


class NoRows:
    """A database that refers to nothing."""

    def referenced(self, *uids: str) -> set[Artifact]:
        return set()

    def erased_ago(self, *uids: str) -> dict[str, float]:
        return {}


def names(store: Store) -> set[str]:
    return {found.name for found in store.objects()}


def test_reads_what_was_published(store: Store) -> None:
    data = os.urandom(100_000)
    artifact = store.publish(TENANT, UID, data)
    assert artifact.length == len(data)
    assert store.read(TENANT, UID, artifact) == data
    assert names(store) == {artifact.name}


def test_publishes_nothing_bytes_and_several_at_once(store: Store) -> None:
    blobs = [b"", b"a", os.urandom(6 << 20)]
    artifacts = store.publish_all(TENANT, UID, blobs)
    assert [store.read(TENANT, UID, artifact) for artifact in artifacts] == blobs
    assert store.publish_all(TENANT, UID, []) == ()


def test_same_bytes_twice_are_two_objects_so_that_deleting_one_keeps_the_other(store: Store) -> None:
    first, second = store.publish(TENANT, UID, b"same"), store.publish(TENANT, UID, b"same")
    assert first.sha256 == second.sha256
    store.delete(TENANT, UID, [first])
    assert store.read(TENANT, UID, second) == b"same"


def test_adapters_do_not_see_each_other(store: Store) -> None:
    artifact = store.publish(TENANT, UID, b"mine")
    for tenant, uid in ((TENANT, OTHER), ("other", UID)):
        with pytest.raises(MissingArtifact):
            store.read(tenant, uid, artifact)


def test_deletes_artifacts_and_adapters_twice_without_error(store: Store) -> None:
    kept = store.publish(TENANT, OTHER, b"kept")
    one, two = store.publish_all(TENANT, UID, [b"one", b"two"])
    store.delete(TENANT, UID, [one])
    store.delete(TENANT, UID, [one, two])
    store.delete(TENANT, UID, [])
    with pytest.raises(MissingArtifact):
        store.read(TENANT, UID, one)
    store.publish_all(TENANT, UID, [b"three", b"four"])
    store.delete_adapter(TENANT, UID)
    store.delete_adapter(TENANT, UID)
    assert names(store) == {kept.name}
    again = store.publish(TENANT, UID, b"again")
    assert store.read(TENANT, UID, again) == b"again"


def test_a_prefix_of_a_uid_or_tenant_is_not_another_adapter(store: Store) -> None:
    kept = store.publish("acme-2", UID, b"kept")
    store.publish("acme", UID, b"gone")
    store.delete_adapter("acme", UID)
    assert names(store) == {kept.name}


@pytest.mark.parametrize(
    ("tenant", "uid"),
    [
        ("..", UID),
        (".", UID),
        ("", UID),
        ("a/b", UID),
        ("../a", UID),
        ("a\n", UID),
        ("a" * 64, UID),
        ("A", UID),
        (TENANT, ".."),
        (TENANT, ""),
        (TENANT, UID + "/.."),
        (TENANT, "g" * 32),
        (TENANT, UID + "\n"),
    ],
)
def test_no_name_leads_out_of_the_store(store: Store, tenant: str, uid: str) -> None:
    artifact = Artifact("0" * 64, 1, "0" * 16)
    for call in (
        lambda: store.publish(tenant, uid, b"x"),
        lambda: store.read(tenant, uid, artifact),
        lambda: store.delete(tenant, uid, [artifact]),
        lambda: store.delete_adapter(tenant, uid),
        lambda: store.discard([StoredObject(tenant, uid, artifact.name, 0.0)]),
    ):
        with pytest.raises(ValueError, match=r"tenant|uid"):
            call()


@pytest.mark.parametrize(
    ("sha256", "nonce"), [("../" * 20, "0" * 16), ("0" * 64, "../../../../etc/x"), ("", "")]
)
def test_no_artifact_leads_out_of_the_store(store: Store, sha256: str, nonce: str) -> None:
    with pytest.raises(ValueError, match="name"):
        store.read(TENANT, UID, Artifact(sha256, 1, nonce))


def test_a_wrong_length_or_digest_is_corrupt(store: Store) -> None:
    artifact = store.publish(TENANT, UID, b"bytes")
    with pytest.raises(CorruptArtifact):
        store.read(TENANT, UID, replace(artifact, length=4))


def test_what_is_put_again_has_its_old_name(store: Store) -> None:
    artifact = store.publish(TENANT, UID, b"bytes")
    store.delete_adapter(TENANT, UID)
    for _ in range(2):
        store.put(TENANT, UID, artifact, b"bytes")
        assert store.read(TENANT, UID, artifact) == b"bytes"
        assert names(store) == {artifact.name}
    with pytest.raises(CorruptArtifact):
        store.put(TENANT, UID, artifact, b"other")
    assert store.read(TENANT, UID, artifact) == b"bytes"


def test_a_put_mends_a_damaged_file_and_what_a_kill_left_of_one(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    artifact = store.publish(TENANT, UID, b"bytes")
    (path,) = files(tmp_path)
    path.write_bytes(b"bytes of another")
    path.with_name(path.name + ".partial").write_bytes(b"by")
    store.put(TENANT, UID, artifact, b"bytes")
    assert store.read(TENANT, UID, artifact) == b"bytes"
    assert files(tmp_path) == [path]
    assert path.stat().st_mode & 0o077 == 0


def test_many_threads_publish_and_delete_in_one_adapter(store: Store) -> None:
    def work(number: int) -> tuple[Artifact, bytes]:
        data = os.urandom(100) + bytes([number])
        dropped, kept = store.publish_all(TENANT, UID, [b"dropped", data])
        store.delete(TENANT, UID, [dropped])
        return kept, data

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(work, range(40)))
    assert names(store) == {artifact.name for artifact, _ in results}
    assert all(store.read(TENANT, UID, artifact) == data for artifact, data in results)


def test_every_flipped_bit_of_a_file_is_noticed(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    artifact = store.publish(TENANT, UID, b"head bytes")
    (path,) = files(tmp_path)
    whole = path.read_bytes()
    for bit in range(len(whole) * 8):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(CorruptArtifact):
            store.read(TENANT, UID, artifact)
    for damaged in (b"", whole[:-1], whole + b"x"):
        path.write_bytes(damaged)
        with pytest.raises(CorruptArtifact):
            store.read(TENANT, UID, artifact)
    path.write_bytes(whole)
    assert store.read(TENANT, UID, artifact) == whole


def test_folders_and_files_are_private(tmp_path: Path) -> None:
    root = tmp_path / "artifacts"
    LocalStore(root).publish(TENANT, UID, b"x")
    assert all(path.stat().st_mode & 0o077 == 0 for path in (root, *root.rglob("*")))


def test_a_deletion_in_the_middle_of_publishing_is_survived(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    stop = threading.Event()

    def delete() -> None:
        while not stop.is_set():
            store.delete_adapter(TENANT, UID)

    deleter = threading.Thread(target=delete)
    deleter.start()
    try:
        for _ in range(10):
            try:
                store.publish(TENANT, UID, b"x")
            except StoreUnavailable:
                # Five deletions in a row hit this one; the commit would have failed anyway.
                continue
    finally:
        stop.set()
        deleter.join()
    assert store.read(TENANT, UID, store.publish(TENANT, UID, b"y")) == b"y"


def test_deletions_of_a_tenant_do_not_fail_its_publications(tmp_path: Path) -> None:
    """Twelve threads publish while the tenant is deleted again and again, as when a busy tenant is erased."""
    store = LocalStore(tmp_path)

    def publish(number: int) -> None:
        for _ in range(20):
            store.publish_all(TENANT, f"{number:032x}", [b"x" * 1000, b"y"])

    def delete() -> None:
        for _ in range(20):
            store.delete_tenant(TENANT)

    with ThreadPoolExecutor(13) as pool:
        running = [pool.submit(publish, number) for number in range(12)] + [pool.submit(delete)]
        for one in running:
            one.result()
    store.delete_tenant(TENANT)
    assert files(tmp_path) == []


def test_a_deletion_finishes_what_an_interrupted_one_left(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.publish(TENANT, UID, b"x")
    store.publish("other", UID, b"y")
    (tmp_path / ".deleted").mkdir()
    (tmp_path / TENANT).rename(tmp_path / ".deleted" / "0123456789abcdef")
    assert [found.tenant for found in store.objects()] == ["other"]
    store.delete_adapter(TENANT, UID)
    assert [path.read_bytes() for path in files(tmp_path)] == [b"y"]


KILLED = """
import os, signal, sys
from adapters.storage import local as folder
target, count = sys.argv[2], int(sys.argv[3])
original, calls = getattr(folder.os, target), 0
def counting(*arguments):
    global calls
    calls += 1
    if calls == count:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments)
from pathlib import Path
store = folder.LocalStore(Path(sys.argv[1]))
setattr(folder.os, target, counting)
store.publish_all("acme", "UID", [b"a" * 1000, b"b" * 1000])
""".replace("UID", UID)


@pytest.mark.parametrize(("target", "count"), [("write", 1), ("fsync", 3), ("fsync", 4), ("fsync", 5)])
def test_a_kill_while_publishing_leaves_only_what_a_sweep_removes(
    tmp_path: Path, target: str, count: int
) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), target, str(count)])
    assert done.returncode == -9
    assert files(tmp_path)
    store = LocalStore(tmp_path)
    sweep(store, NoRows(), older_than=-1.0)
    sweep(store, NoRows(), kept_aside=-1.0)
    assert files(tmp_path) == []
    assert store.read(TENANT, UID, store.publish(TENANT, UID, b"x")) == b"x"


FULL = """
import sys
from pathlib import Path
from adapters.storage.local import LocalStore
from adapters.storage.artifact import StoreFull
root = Path(sys.argv[1])
store = LocalStore(root)
kept = store.publish("acme", "UID", b"kept")
try:
    store.publish_all("acme", "UID", [b"a" * 1000, b"b" * (4 << 20)])
except StoreFull as error:
    assert error.code == "store_full"
else:
    sys.exit("not full")
assert [path.name for path in root.rglob("*") if path.is_file()] == [kept.name], list(root.rglob("*"))
assert store.read("acme", "UID", kept) == b"kept"
print("as it should")
""".replace("UID", UID)


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    mount = f'mount -t tmpfs -o size=1m tmpfs "{tmp_path}" && "$0" -c "$1" "{tmp_path}"'
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", mount, sys.executable, FULL],
        capture_output=True,
        text=True,
    )
    if "unshare failed" in done.stderr or "permission denied" in done.stderr:
        pytest.skip("this machine lets nobody mount a small disk")
    assert done.stdout.strip() == "as it should", done.stderr


def test_an_unreachable_bucket_is_unavailable(s3_options: dict[str, str]) -> None:
    store = open_store("s3://no-such-bucket/artifacts", s3_options)
    with pytest.raises(StoreUnavailable):
        store.publish(TENANT, UID, b"x")


def test_a_folder_that_cannot_be_made_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreUnavailable):
        open_store(str(tmp_path / "file" / "artifacts"))


def test_a_folder_that_cannot_be_listed_is_unavailable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(tmp_path)

    def broken(folder: Path) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("adapters.storage.files.os.scandir", broken)
    with pytest.raises(StoreUnavailable):
        list(store.objects())


def test_a_quota_is_a_full_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(tmp_path)

    def over_quota(descriptor: int) -> None:
        raise OSError(122, "Disk quota exceeded")

    monkeypatch.setattr("adapters.storage.local.os.fsync", over_quota)
    with pytest.raises(StoreFull):
        store.publish(TENANT, UID, b"x")
    assert files(tmp_path) == []

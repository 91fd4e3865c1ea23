"""The artifact store in a bucket: S3 or a compatible service, Google Cloud Storage or Azure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import from_url

from adapters.storage.artifact import (
    ASIDE,
    IDENTITY,
    Artifact,
    Buffer,
    StoredObject,
    StoreUnavailable,
    adapter_key,
    check,
    missing,
    object_key,
    parse_key,
    tenant_key,
    verified,
)

_PARALLEL_PUTS = 4
# Retries end before a request times out, so that the caller is told about the bucket.
_RETRIES = {"max_retries": 5, "retry_timeout": timedelta(seconds=20)}


class BucketStore:
    """A Store in a bucket. Artifacts are durable once the bucket has acknowledged them."""

    def __init__(self, url: str, options: Mapping[str, str]) -> None:
        self._url = url
        arguments: dict[str, Any] = {**options, "retry_config": _RETRIES}
        if options.get("endpoint", "").startswith("http://"):
            arguments["client_options"] = {"allow_http": True}
        with _translated():
            self._bucket = from_url(url, **arguments)

    def publish(self, tenant: str, adapter_uid: str, data: Buffer) -> Artifact:
        artifact = Artifact.describe(data)
        self._put(object_key(tenant, adapter_uid, artifact.name), data)
        return artifact

    def put(self, tenant: str, adapter_uid: str, artifact: Artifact, data: Buffer) -> None:
        check(artifact, data)
        self._put(object_key(tenant, adapter_uid, artifact.name), data)

    def publish_all(self, tenant: str, adapter_uid: str, blobs: Sequence[Buffer]) -> tuple[Artifact, ...]:
        with ThreadPoolExecutor(_PARALLEL_PUTS) as pool:
            return tuple(pool.map(lambda data: self.publish(tenant, adapter_uid, data), blobs))

    def read(self, tenant: str, adapter_uid: str, artifact: Artifact) -> bytes:
        key = object_key(tenant, adapter_uid, artifact.name)
        with _translated():
            try:
                data = bytes(obstore.get(self._bucket, key).bytes())
            except FileNotFoundError:
                raise missing(artifact) from None
        return verified(artifact, data)

    def delete(self, tenant: str, adapter_uid: str, artifacts: Iterable[Artifact]) -> None:
        self._delete([object_key(tenant, adapter_uid, artifact.name) for artifact in artifacts])

    def delete_adapter(self, tenant: str, adapter_uid: str) -> None:
        key = adapter_key(tenant, adapter_uid)
        self._delete_below(key)
        self._delete_below(f"{ASIDE}/{key}")

    def delete_tenant(self, tenant: str) -> None:
        key = tenant_key(tenant)
        self._delete_below(key)
        self._delete_below(f"{ASIDE}/{key}")

    def objects(self, *, aside: bool = False) -> Iterator[StoredObject]:
        """Yield objects as Store does; ages compare the bucket's write time with the local clock."""
        prefix = f"{ASIDE}/" if aside else ""
        with _translated():
            for chunk in obstore.list(self._bucket, prefix or None, chunk_size=1000):
                now = datetime.now(UTC)
                for found in chunk:
                    parsed = parse_key(found["path"].removeprefix(prefix))
                    if parsed is not None:
                        yield StoredObject(*parsed, age=(now - found["last_modified"]).total_seconds())

    def discard(self, objects: Collection[StoredObject], *, aside: bool = False) -> None:
        prefix = f"{ASIDE}/" if aside else ""
        self._delete([prefix + found.key for found in objects])

    def put_aside(self, objects: Collection[StoredObject]) -> None:
        self._move({found.key: f"{ASIDE}/{found.key}" for found in objects})

    def put_back(self, objects: Collection[StoredObject]) -> None:
        self._move({f"{ASIDE}/{found.key}": found.key for found in objects})

    @property
    def location(self) -> str:
        return self._url

    def identity(self) -> str | None:
        with _translated():
            try:
                return bytes(obstore.get(self._bucket, IDENTITY).bytes()).decode("latin-1").strip()
            except FileNotFoundError:
                return None

    def claim(self, identity: str) -> None:
        with _translated(), suppress(AlreadyExistsError):
            obstore.put(self._bucket, IDENTITY, identity.encode() + b"\n", mode="create")

    def _move(self, keys: Mapping[str, str]) -> None:
        with _translated():
            for source, target in keys.items():
                with suppress(FileNotFoundError):
                    # A bucket cannot move an object: it is copied, then deleted.
                    obstore.rename(self._bucket, source, target)

    def _delete_below(self, prefix: str) -> None:
        with _translated():
            for chunk in obstore.list(self._bucket, prefix, chunk_size=1000):
                self._delete([found["path"] for found in chunk])

    def _put(self, key: str, data: Buffer) -> None:
        with _translated():
            # A single request: parts of an interrupted multipart upload would remain, unseen and billed.
            obstore.put(self._bucket, key, data, use_multipart=False)

    def _delete(self, keys: list[str]) -> None:
        if not keys:
            return
        with _translated():
            try:
                obstore.delete(self._bucket, keys)
            except FileNotFoundError:
                # Some services refuse the whole list if one key is already gone.
                for key in keys:
                    with suppress(FileNotFoundError):
                        obstore.delete(self._bucket, key)


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    # obstore raises its own errors, or built-in ones where they fit.
    except (BaseError, OSError) as error:
        raise StoreUnavailable("The bucket does not answer as expected. Try again later.") from error

"""The artifact store in a bucket: S3 or a compatible service, Google Cloud Storage or Azure."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, GenericError
from obstore.store import ObjectStore, from_url

from adapters.storage.artifact import (
    ASIDE,
    IDENTITY,
    Artifact,
    Buffer,
    StoredObject,
    StoreError,
    StoreUnavailable,
    adapter_key,
    check,
    missing,
    object_key,
    parse_key,
    tenant_key,
    verified,
)
from adapters.storage.breaker import Breaker

if TYPE_CHECKING:
    from obstore import ObjectMeta

_PARALLEL_PUTS = 4
_MOST_RETRIES = 5
# obstore has no classes for these errors: they are those of its HTTP client, without an answer's status.
_NO_ANSWER = re.compile(r"\bkind: (Timeout|Connect|Request|Interrupted)\b")


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds that calls to the bucket may take.

    While a request is sent there is nothing to read, so what it sends says how long it may take; `silence` at
    least.
    """

    silence: float = 5.0  # between two pieces of an answer
    answer: float = 600.0  # for an answer that arrives piece by piece
    megabyte: float = 1.0  # for each that is sent
    deletion: float = 0.02  # for each object
    copy: float = 80.0  # of an object, after which the bucket answers


class BucketStore:
    """A Store in a bucket. Artifacts are durable once the bucket has acknowledged them."""

    def __init__(self, url: str, options: Mapping[str, str], patience: Patience = Patience()) -> None:
        self._url = url
        self._patience = patience
        self._options = dict(options)
        self._making = threading.Lock()
        self._senders: dict[float, ObjectStore] = {}
        self._breaker = Breaker(self._answers)
        with _translated():
            self._bucket = self._client(
                patience.silence, read_timeout=patience.silence, timeout=patience.answer
            )

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
        with self._call():
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
        for page in self._pages(prefix or None):
            now = datetime.now(UTC)
            for found in page:
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

    @property
    def available(self) -> bool:
        return not self._breaker.is_open

    def identity(self) -> str | None:
        with self._call():
            try:
                return bytes(obstore.get(self._bucket, IDENTITY).bytes()).decode("latin-1").strip()
            except FileNotFoundError:
                return None

    def claim(self, identity: str) -> None:
        with self._call(), suppress(AlreadyExistsError):
            obstore.put(self._bucket, IDENTITY, identity.encode() + b"\n", mode="create")

    def _move(self, keys: Mapping[str, str]) -> None:
        for source, target in keys.items():
            with self._call(), suppress(FileNotFoundError):
                # A bucket cannot move an object: it is copied, then deleted.
                obstore.rename(self._sender(self._patience.copy), source, target)

    def _delete_below(self, prefix: str) -> None:
        for page in self._pages(prefix):
            self._delete([found["path"] for found in page])

    def _pages(self, prefix: str | None) -> Iterator[Sequence[ObjectMeta]]:
        with self._call():
            pages = iter(obstore.list(self._bucket, prefix, chunk_size=1000))
        while True:
            with self._call():
                page = next(pages, None)
            if page is None:
                return
            yield page

    def _put(self, key: str, data: Buffer) -> None:
        with self._call():
            # A single request: parts of an interrupted multipart upload would remain, unseen and billed.
            obstore.put(
                self._sender(len(data) / 1e6 * self._patience.megabyte), key, data, use_multipart=False
            )

    def _delete(self, keys: list[str]) -> None:
        if not keys:
            return
        with self._call():
            try:
                obstore.delete(self._sender(len(keys) * self._patience.deletion), keys)
            except FileNotFoundError:
                # Some services refuse the whole list if one key is already gone.
                for key in keys:
                    with suppress(FileNotFoundError):
                        obstore.delete(self._bucket, key)

    def _sender(self, seconds: float) -> ObjectStore:
        """Return a client for a call that may take this long; as many are made as powers of two."""
        least = self._patience.silence
        timeout = least * 2 ** math.ceil(math.log2(max(seconds, least) / least))
        with self._making:
            if timeout not in self._senders:
                self._senders[timeout] = self._client(timeout, timeout=timeout)
            return self._senders[timeout]

    def _client(self, patience: float, **timeouts: float) -> ObjectStore:
        """Return a client with these timeouts, which retries only what failed within `patience` seconds."""
        client: dict[str, Any] = {name: timedelta(seconds=value) for name, value in timeouts.items()}
        if self._options.get("endpoint", "").startswith("http://"):
            client["allow_http"] = True
        retries = {"max_retries": _MOST_RETRIES, "retry_timeout": timedelta(seconds=0.9 * patience)}
        arguments: dict[str, Any] = {**self._options, "client_options": client, "retry_config": retries}
        opened: ObjectStore = from_url(self._url, **arguments)
        return opened

    def _answers(self) -> bool:
        try:
            obstore.head(self._bucket, IDENTITY)
        except (BaseError, OSError) as error:
            return not _is_unanswered(error)
        return True

    @contextmanager
    def _call(self) -> Iterator[None]:
        """One call to the bucket. Raises StoreUnavailable at once while the bucket does not answer."""
        begun = self._breaker.begin()
        try:
            with _translated():
                yield
        except StoreUnavailable as error:
            if _is_unanswered(error.__cause__):
                self._breaker.unanswered(begun)
            else:
                self._breaker.answered()
            raise
        except StoreError:
            self._breaker.answered()
            raise
        self._breaker.answered()


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    # obstore raises its own errors, or built-in ones where they fit.
    except (BaseError, OSError) as error:
        raise StoreUnavailable("The bucket does not answer as expected. Try again later.") from error


def _is_unanswered(error: BaseException | None) -> bool:
    return isinstance(error, GenericError) and _NO_ANSWER.search(str(error)) is not None

"""Opens the store that a setting names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from adapters.storage.artifact import Store


def open_store(location: str, options: Mapping[str, str] | None = None) -> Store:
    """The store at a folder or at a bucket URL (s3://bucket/prefix, also gs:// and az://).

    `options` are obstore's, e.g. endpoint, region, access_key_id, secret_access_key; without them the cloud's
    own chain of credentials holds. Raises StoreUnavailable when the folder cannot be made.
    """
    if "://" in location and not location.startswith("file://"):
        # A service on a local folder need not load a cloud client.
        from adapters.storage.bucket import BucketStore

        return BucketStore(location, options or {})
    from adapters.storage.local import LocalStore

    return LocalStore(Path(location.removeprefix("file://")))

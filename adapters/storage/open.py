"""Opens the store that a setting names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from adapters.storage.artifact import Store


def open_store(location: str, options: Mapping[str, str] | None = None) -> Store:
    """Open the store in a folder or at a bucket URL (s3://bucket/prefix, also gs:// and az://).

    `options` are obstore's, e.g. endpoint, region, access_key_id, secret_access_key; without them the cloud's
    default chain of credentials is used. Raises StoreUnavailable if the folder cannot be made.
    """
    if "://" in location and not location.startswith("file://"):
        # A service on a local folder need not load a cloud client.
        from adapters.storage.bucket import BucketStore

        return BucketStore(location, options or {})
    from adapters.storage.local import LocalStore

    return LocalStore(Path(location.removeprefix("file://")))

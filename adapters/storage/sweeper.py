"""Finds objects that a killed process published but never recorded; puts them aside, then deletes them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

from adapters.storage.artifact import PARTIAL, Artifact, Store, StoredObject

HOUR, DAY = 3_600.0, 86_400.0  # seconds

SWEPT_AGE = 6 * HOUR
"""Age in seconds from which an object that no row refers to counts as left over. It protects objects that are
not yet committed: the first part of an upload may wait some hours for the last one."""

KEPT_ASIDE = 7 * DAY
"""Seconds for which an object that was put aside can be brought back."""

# One sweep puts aside at most this share of all objects, or this number if it is larger. To the wrong
# database, every object looks left over.
_SHARE, _FEW = 0.05, 20
# Most adapters whose rows are read in one query, and most objects in memory for that.
_ADAPTERS, _OBJECTS = 1_000, 50_000


class Rows(Protocol):
    """The registry's side of a sweep."""

    def referenced(self, *uids: str) -> set[Artifact]:
        """Return the artifacts that rows of the adapters refer to."""
        ...

    def erased_ago(self, *uids: str) -> dict[str, float]:
        """Return the seconds since something of each adapter was last erased, if anything was."""
        ...


@dataclass(frozen=True, slots=True)
class Swept:
    """What a sweep did, in numbers of objects."""

    aside: int = 0
    deleted: int = 0
    brought_back: int = 0
    spared: int = 0  # left in place, because they were too many for one sweep


def orphans(
    objects: Iterable[StoredObject],
    referenced: Callable[..., set[Artifact]],
    older_than: float = SWEPT_AGE,
) -> Iterator[list[StoredObject]]:
    """Yield, per adapter, the objects that no row refers to and that are older than `older_than` seconds.

    `referenced`: see Rows.
    """
    old = ([found for found in group if found.age > older_than] for group in _groups(objects))
    for groups in _chunks(group for group in old if group):
        # Rows are read after the listing: an old name without a reference now never gets one later. A name
        # is of one adapter only, so that all names can be compared with those of all these adapters.
        kept = {artifact.name for artifact in referenced(*_uids(groups))}
        for group in groups:
            left = [found for found in group if found.name not in kept]
            if left:
                yield left


def sweep(
    store: Store, rows: Rows, *, older_than: float = SWEPT_AGE, kept_aside: float = KEPT_ASIDE
) -> Swept:
    """Put aside objects that no row refers to, and delete them later.

    `older_than`: age in seconds from which objects are put aside. `kept_aside`: seconds until they are
    deleted. Objects that rows refer to again are brought back. Interrupted publications are deleted at once,
    and so are objects that may contain something erased since they were stored: an erasure leaves nothing
    aside.
    """
    brought_back, deleted = bring_back(store, rows.referenced), 0
    for group in _groups(store.objects(aside=True)):
        spent = [found for found in group if found.age > kept_aside]
        store.discard(spent, aside=True)
        deleted += len(spent)

    total = 0

    def counted() -> Iterator[StoredObject]:
        nonlocal total
        for found in store.objects():
            total += 1
            yield found

    left: list[StoredObject] = []
    began = time.monotonic()
    for groups in _chunks(orphans(counted(), rows.referenced, older_than)):
        erased = rows.erased_ago(*_uids(groups))
        # Ages are of the listing, at the earliest of its begin.
        listed = time.monotonic() - began
        for group in groups:
            since = erased.get(group[0].adapter_uid, math.inf) - listed
            gone: list[StoredObject] = []
            for one in group:
                (gone if one.name.endswith(PARTIAL) or one.age >= since else left).append(one)
            store.discard(gone)
            deleted += len(gone)
    left.sort(key=lambda one: -one.age)
    most = max(_FEW, int(_SHARE * total))
    store.put_aside(left[:most])
    return Swept(len(left[:most]), deleted, brought_back, len(left[most:]))


def bring_back(store: Store, referenced: Callable[..., set[Artifact]]) -> int:
    """Put back objects that were put aside although rows refer to them; return how many.

    `referenced`: see Rows.
    """
    count = 0
    for groups in _chunks(_groups(store.objects(aside=True))):
        wanted = {artifact.name for artifact in referenced(*_uids(groups))}
        for group in groups:
            lost = [found for found in group if found.name in wanted]
            store.put_back(lost)
            count += len(lost)
    return count


def _groups(objects: Iterable[StoredObject]) -> Iterator[list[StoredObject]]:
    """Yield the objects of each adapter."""
    for _, group in groupby(objects, key=lambda found: (found.tenant, found.adapter_uid)):
        yield list(group)


def _chunks(groups: Iterable[list[StoredObject]]) -> Iterator[list[list[StoredObject]]]:
    """Yield the groups in lists of up to _ADAPTERS, or of about _OBJECTS objects."""
    chunk: list[list[StoredObject]] = []
    objects = 0
    for group in groups:
        chunk.append(group)
        objects += len(group)
        if len(chunk) == _ADAPTERS or objects >= _OBJECTS:
            yield chunk
            chunk, objects = [], 0
    if chunk:
        yield chunk


def _uids(groups: Iterable[list[StoredObject]]) -> list[str]:
    return [group[0].adapter_uid for group in groups]

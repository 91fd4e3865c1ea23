"""Finds objects that a killed process published but never recorded; puts them aside, then deletes them."""

from __future__ import annotations

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


class Rows(Protocol):
    """The registry's side of a sweep."""

    def referenced(self, uid: str) -> set[Artifact]:
        """Return the artifacts that rows of the adapter refer to."""
        ...

    def erased_ago(self, uid: str) -> float | None:
        """Return the seconds since something of the adapter was last erased; None if nothing was."""
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
    referenced: Callable[[str], set[Artifact]],
    older_than: float = SWEPT_AGE,
) -> Iterator[list[StoredObject]]:
    """Yield, per adapter, the objects that no row refers to and that are older than `older_than` seconds."""
    for (_, uid), group in groupby(objects, key=lambda found: (found.tenant, found.adapter_uid)):
        old = [found for found in group if found.age > older_than]
        if old:
            # Rows are read after the listing: an old name without a reference now never gets one later.
            kept = {artifact.name for artifact in referenced(uid)}
            left = [found for found in old if found.name not in kept]
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
    for found in orphans(counted(), rows.referenced, older_than):
        erased = rows.erased_ago(found[0].adapter_uid)
        gone: list[StoredObject] = []
        for one in found:
            doomed = one.name.endswith(PARTIAL) or (erased is not None and one.age >= erased)
            (gone if doomed else left).append(one)
        store.discard(gone)
        deleted += len(gone)
    left.sort(key=lambda one: -one.age)
    most = max(_FEW, int(_SHARE * total))
    store.put_aside(left[:most])
    return Swept(len(left[:most]), deleted, brought_back, len(left[most:]))


def bring_back(store: Store, referenced: Callable[[str], set[Artifact]]) -> int:
    """Put back objects that were put aside although rows refer to them; return how many."""
    count = 0
    for group in _groups(store.objects(aside=True)):
        wanted = {artifact.name for artifact in referenced(group[0].adapter_uid)}
        lost = [found for found in group if found.name in wanted]
        store.put_back(lost)
        count += len(lost)
    return count


def _groups(objects: Iterable[StoredObject]) -> Iterator[list[StoredObject]]:
    """Yield the objects of each adapter."""
    for _, group in groupby(objects, key=lambda found: (found.tenant, found.adapter_uid)):
        yield list(group)

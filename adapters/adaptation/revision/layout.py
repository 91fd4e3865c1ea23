"""The layout of an adapter's examples after a change: which rows are new, which files are rewritten.

Pure bookkeeping: nothing is read or written here. A row that no example uses any more never stays in a file
that is in use, so that what a tenant removes or replaces is gone from the disk as well.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from adapters.examples.target import Target
from adapters.examples.validation import ValidExample
from adapters.registry.records import ExampleRecord, ExampleWrite, Repoint
from adapters.storage.artifact import Artifact

# Small files are merged: an adapter taught one example at a time would else read one per example at a fit.
SMALL_BYTES = 1 << 20  # files below this size are merged
MERGED_AT_ONCE = 16  # files; fewer small ones are left as they are
_MOST_MERGED = 64  # files merged per change


@dataclass(frozen=True, slots=True)
class SegmentSlot:
    """The place of an embedding, and of its input at the same row of another file if inputs are kept."""

    segment: Artifact
    row: int
    inputs: Artifact | None


Stored = SegmentSlot | ExampleRecord
"""Anything with a place. Making slots of tens of thousands of records would take longer than the rest."""


@dataclass(frozen=True, slots=True)
class PlannedExample:
    """An example after the change."""

    id: str
    digest: str
    target: Target
    group: str | None
    sampled: bool
    excluded: bool
    source: Stored | int  # its present place, or its row in the new segment

    @classmethod
    def of(cls, example: ExampleRecord | ValidExample, source: Stored | int) -> PlannedExample:
        """Return the example with this source."""
        return cls(
            example.id,
            example.digest,
            example.target,
            example.group,
            example.sampled,
            example.excluded,
            source,
        )


@dataclass(frozen=True, slots=True)
class LayoutPlan:
    """What a change does to the files."""

    rows: tuple[PlannedExample, ...]  # all examples after the change, sorted by id
    upserted: frozenset[str]  # ids of the examples that the change writes
    fresh: tuple[ValidExample, ...]  # the contents of the new segment, one example per distinct input
    bundles: tuple[tuple[Stored, ...], ...]  # distinct places; each bundle moves into one rewritten segment

    @property
    def in_use(self) -> tuple[PlannedExample, ...]:
        """The examples that are learned from."""
        return tuple(row for row in self.rows if not row.excluded)


def plan_change(
    kept: Sequence[ExampleRecord],
    upserts: Sequence[ValidExample],
    *,
    removals: Collection[str] = (),
    clear: bool = False,
) -> LayoutPlan:
    """Plan to add or replace `upserts` and to remove `removals`, or with `clear` all other examples.

    An input that the adapter has is not stored again, except with `clear`: then the old files go as a whole.
    An upsert without an input refers to one that the adapter has.
    """
    wanted = {example.digest for example in upserts}
    places = {} if clear else {one.digest: one for one in kept if one.digest in wanted}
    written = {example.id for example in upserts}
    staying: list[ExampleRecord] = []
    leaving: list[ExampleRecord] = []
    for one in kept:
        (leaving if clear or one.id in written or one.id in removals else staying).append(one)
    fresh: dict[str, tuple[int, ValidExample]] = {}
    rows = [PlannedExample.of(one, one) for one in staying]
    for example in upserts:
        source: Stored | int | None = places.get(example.digest)
        if source is None:
            source = fresh.setdefault(example.digest, (len(fresh), example))[0]
        rows.append(PlannedExample.of(example, source))
    used = [row.source for row in rows if not isinstance(row.source, int)]
    return LayoutPlan(
        rows=tuple(sorted(rows, key=lambda row: row.id)),
        upserted=frozenset(written),
        fresh=tuple(example for _, example in fresh.values()),
        bundles=() if clear else _bundles(used, leaving),
    )


def locate(
    plan: LayoutPlan, fresh: SegmentSlot | None, bundles: Sequence[SegmentSlot]
) -> tuple[tuple[ExampleWrite, ...], tuple[Repoint, ...]]:
    """Return the rows to write and to repoint, once the files of the plan are published.

    Each file is given as the slot of its first row.
    """
    moved: dict[tuple[str, int], SegmentSlot] = {}
    for bundle, start in zip(plan.bundles, bundles, strict=True):
        moved |= {_key(old): SegmentSlot(start.segment, row, start.inputs) for row, old in enumerate(bundle)}
    writes: list[ExampleWrite] = []
    repoints: list[Repoint] = []
    for row in plan.rows:
        place: Stored
        if isinstance(row.source, int):
            assert fresh is not None
            place = SegmentSlot(fresh.segment, row.source, fresh.inputs)
        else:
            place = moved.get(_key(row.source), row.source)
        if row.id in plan.upserted:
            writes.append(
                ExampleWrite(
                    id=row.id,
                    digest=row.digest,
                    target=row.target,
                    segment=place.segment,
                    row=place.row,
                    inputs=place.inputs,
                    group=row.group,
                    sampled=row.sampled,
                    excluded=row.excluded,
                )
            )
        elif place is not row.source:
            repoints.append(Repoint(row.id, place.segment, place.row, place.inputs))
    return tuple(writes), tuple(repoints)


def _bundles(used: Sequence[Stored], left: Sequence[Stored]) -> tuple[tuple[Stored, ...], ...]:
    """Return a bundle for each file with a vacated row, and for the small files together if they are many."""
    in_use = {_key(place) for place in used} if left else set()
    vacated = {place.segment.nonce for place in left if _key(place) not in in_use}
    files = {place.segment.nonce: place for place in used}
    small = [nonce for nonce, place in files.items() if nonce not in vacated and _size(place) < SMALL_BYTES]
    merged = set(small[:_MOST_MERGED]) if len(small) >= MERGED_AT_ONCE else set()
    if not vacated and not merged:
        return ()
    bundles: dict[str, dict[tuple[str, int], Stored]] = {}
    for place in used:
        nonce = place.segment.nonce
        if nonce in vacated or nonce in merged:
            # Inputs may be lost for some segments only, which are merged apart from the others.
            together = str(place.inputs is None) if nonce in merged else nonce
            bundles.setdefault(together, {})[_key(place)] = place
    return tuple(tuple(places[key] for key in sorted(places)) for places in bundles.values())


def _key(place: Stored) -> tuple[str, int]:
    """Return a key that is unique among the places of the adapter, and quick to hash."""
    return place.segment.nonce, place.row


def _size(place: Stored) -> int:
    return place.segment.length + (place.inputs.length if place.inputs else 0)

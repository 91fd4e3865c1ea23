"""The layout of examples after a change: nothing is stored twice, and no file keeps erased ones."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.adaptation.revision.layout import MERGED_AT_ONCE, SMALL_BYTES, SegmentSlot, locate, plan_change
from adapters.examples.target import input_digest
from adapters.examples.validation import ValidExample
from adapters.registry.records import ExampleRecord
from adapters.storage.artifact import Artifact


def artifact(name: str, length: int = SMALL_BYTES) -> Artifact:
    return Artifact(f"{name:0>64}", length, f"{name:0>16}")


def record(name: str, text: str, segment: str, row: int, length: int = SMALL_BYTES) -> ExampleRecord:
    place = artifact(segment, length), row, artifact("1" + segment, length)
    return ExampleRecord(name, input_digest(text), "a", *place, created_at=datetime.now(UTC))


def posted(name: str, text: str | None, digest: str | None = None) -> ValidExample:
    return ValidExample(name, digest or input_digest(text or ""), "a", text, 0)


KEPT = [record("a", "A", "1", 0), record("b", "B", "1", 1), record("c", "C", "2", 0)]


def test_a_known_input_is_not_stored_again() -> None:
    plan = plan_change(KEPT, [posted("d", "A"), posted("e", "E"), posted("f", "E")])
    assert [one.id for one in plan.fresh] == ["e"]
    sources = {row.id: row.source for row in plan.rows}
    assert sources["d"] == sources["a"]
    assert sources["e"] == sources["f"] == 0
    assert plan.bundles == ()


def test_a_removed_row_takes_its_file_along() -> None:
    plan = plan_change(KEPT, [], removals=["a"])
    assert [[place.row for place in bundle] for bundle in plan.bundles] == [[1]]
    moved = SegmentSlot(artifact("9"), 0, artifact("19"))
    writes, repoints = locate(plan, None, [moved])
    assert writes == ()
    assert [(one.id, one.segment, one.row, one.inputs) for one in repoints] == [
        ("b", moved.segment, 0, moved.inputs)
    ]


def test_a_row_shared_by_two_examples_stays_with_the_other() -> None:
    kept = [*KEPT, record("a2", "A", "1", 0)]
    assert plan_change(kept, [], removals=["a"]).bundles == ()


def test_a_replaced_input_leaves_its_file() -> None:
    plan = plan_change(KEPT, [posted("a", "new")])
    assert [[place.row for place in bundle] for bundle in plan.bundles] == [[1]]
    assert [row.source for row in plan.rows if row.id == "a"] == [0]


def test_a_corrected_label_moves_nothing() -> None:
    plan = plan_change(KEPT, [posted("a", None, input_digest("A"))])
    assert (plan.fresh, plan.bundles) == ((), ())
    writes, repoints = locate(plan, None, [])
    assert [(one.id, one.row) for one in writes] == [("a", 0)]
    assert repoints == ()


def test_clearing_stores_what_is_kept_anew() -> None:
    plan = plan_change(KEPT, [posted("x", "A"), posted("y", "Y")], clear=True)
    assert [row.id for row in plan.rows] == ["x", "y"]
    assert [one.id for one in plan.fresh] == ["x", "y"]
    assert plan.bundles == ()


def test_many_small_files_are_merged() -> None:
    kept = [record(f"e{index}", str(index), str(index), 0, length=100) for index in range(MERGED_AT_ONCE)]
    plan = plan_change(kept, [posted("x", "X")])
    assert [len(bundle) for bundle in plan.bundles] == [MERGED_AT_ONCE]
    assert plan_change(kept[1:], [posted("x", "X")]).bundles == ()


texts = st.sampled_from("ABCDEF")
names = st.sampled_from("abcdef")


@settings(max_examples=300)
@given(
    first=st.dictionaries(names, texts, max_size=6),
    upserts=st.dictionaries(names, texts, max_size=4),
    removals=st.sets(names, max_size=4),
    clear=st.booleans(),
)
def test_every_example_finds_its_input_and_nothing_else_is_left(
    first: dict[str, str], upserts: dict[str, str], removals: set[str], clear: bool
) -> None:
    """Two changes in a row, followed in a model of the files: rows of inputs by file."""
    files: dict[Artifact, list[str]] = {}
    kept: list[ExampleRecord] = []
    gone = removals & first.keys() - upserts.keys() if not clear else set()
    for number, (changes, erased, cleared) in enumerate([(first, set(), False), (upserts, gone, clear)]):
        plan = plan_change(
            kept, [posted(name, text) for name, text in changes.items()], removals=erased, clear=cleared
        )
        bundles = []
        for index, bundle in enumerate(plan.bundles):
            moved = artifact(f"b{number}{index}")
            files[moved] = [files[place.segment][place.row] for place in bundle]
            bundles.append(SegmentSlot(moved, 0, None))
        new = artifact(f"f{number}")
        files[new] = [str(one.input) for one in plan.fresh]
        writes, repoints = locate(plan, SegmentSlot(new, 0, None) if plan.fresh else None, bundles)
        after = {} if cleared else {one.id: one for one in kept if one.id not in erased}
        for write in writes:
            after[write.id] = ExampleRecord(
                write.id, write.digest, write.target, write.segment, write.row, None, datetime.now(UTC)
            )
        for repoint in repoints:
            before = after[repoint.id]
            after[repoint.id] = ExampleRecord(
                before.id, before.digest, before.target, repoint.segment, repoint.row, None, before.created_at
            )
        kept = list(after.values())
    expected = ({} if clear else {name: text for name, text in first.items() if name not in gone}) | upserts
    assert {one.id: files[one.segment][one.row] for one in kept} == expected
    in_use = {one.segment for one in kept}
    left = {(segment, row) for segment in in_use for row in range(len(files[segment]))}
    assert left == {(one.segment, one.row) for one in kept}


def test_group_and_sampled_go_with_their_example() -> None:
    kept = [replace(one, group="g", sampled=False) for one in KEPT]
    upserts = [replace(posted("a", None, input_digest("A")), group="h"), posted("x", "X")]
    plan = plan_change(kept, upserts, removals=["c"])
    assert {row.id: (row.group, row.sampled) for row in plan.rows} == {
        "a": ("h", True),
        "b": ("g", False),
        "x": (None, True),
    }
    writes, _ = locate(plan, SegmentSlot(artifact("9"), 0, None), [])
    assert {one.id: (one.group, one.sampled) for one in writes} == {"a": ("h", True), "x": (None, True)}

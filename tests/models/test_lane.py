from __future__ import annotations

import threading
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from models.lane import Lane


@dataclass(eq=False)
class Call:
    source: str
    inputs: list[int] = field(default_factory=list)
    next: int = 0


def lane(*calls: Call) -> Lane[Call]:
    made: Lane[Call] = Lane(threading.Lock())
    for call in calls:
        made.add(call)
    return made


def call(source: str, count: int) -> Call:
    return Call(source, list(range(count)))


def test_sources_take_turns_and_so_do_the_callers_of_one() -> None:
    flood = [call("flood", 3) for _ in range(2)]
    other = call("other", 2)
    waiting = lane(*flood, other)
    assert waiting.depth == 8
    order = [
        (found.source, flood.index(found) if found in flood else 0, index)
        for found, index in one_by_one(waiting)
    ]
    assert order == [
        ("flood", 0, 0),
        ("other", 0, 0),
        ("flood", 1, 0),
        ("other", 0, 1),
        ("flood", 0, 1),
        ("flood", 1, 1),
        ("flood", 0, 2),
        ("flood", 1, 2),
    ]  # fmt: skip
    assert waiting.depth == 0


def one_by_one(waiting: Lane[Call]) -> list[tuple[Call, int]]:
    found = []
    while waiting.depth:
        found += waiting.take(1)
    return found


def test_a_batch_holds_something_of_each_source() -> None:
    waiting = lane(*(call("flood", 1) for _ in range(50)), call("other", 1))
    assert "other" in {found.source for found, _ in waiting.take(4)}


def test_what_is_ahead_of_a_source_is_no_flood() -> None:
    waiting = lane(*(call("flood", 1) for _ in range(500)), call("third", 2))
    assert waiting.ahead("flood", 1) == 502
    assert waiting.ahead("other", 1) == 2
    assert waiting.ahead("third", 1) == 2 + 3
    assert lane().ahead("other", 5) == 0


def test_a_source_has_its_share_of_a_full_queue() -> None:
    waiting = lane(*(call("flood", 1) for _ in range(100)))
    assert not waiting.has_share("flood", 1, 100)
    assert waiting.has_share("other", 50, 100)
    assert not waiting.has_share("other", 51, 100)
    waiting.add(call("other", 50))
    assert waiting.has_share("third", 33, 100)
    assert not waiting.has_share("third", 34, 100)
    # However many sources there are.
    for number in range(50):
        waiting.add(call(f"more{number}", 1))
    assert not waiting.has_share("last", 1, 100)


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 5), st.booleans()), max_size=30),
    st.integers(1, 7),
)
def test_every_input_is_taken_once_in_its_order_or_removed(
    calls: list[tuple[str, int, bool]], room: int
) -> None:
    made = [(call(source, count), gone) for source, count, gone in calls]
    waiting = lane(*(one for one, _ in made))
    taken = waiting.take(room)
    for one, gone in made:
        if gone:
            waiting.remove(one)
            waiting.remove(one)
    while waiting.depth:
        more = waiting.take(room)
        assert 0 < len(more) <= room
        taken += more
    assert waiting.take(room) == []
    for one, gone in made:
        places = [index for found, index in taken if found is one]
        assert places == list(range(len(places)))
        assert gone or places == one.inputs

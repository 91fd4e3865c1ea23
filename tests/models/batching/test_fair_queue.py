from __future__ import annotations

import threading
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from models.batching.fair_queue import FairQueue, Priority


@dataclass(eq=False)
class Call:
    source: str
    costs: list[float] = field(default_factory=list)
    next: int = 0


def lane(*calls: Call) -> FairQueue[Call]:
    made: FairQueue[Call] = FairQueue(threading.Lock())
    for call in calls:
        made.add(call)
    return made


def call(source: str, count: int, cost: float = 1.0) -> Call:
    return Call(source, [cost] * count)


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


def one_by_one(waiting: FairQueue[Call]) -> list[tuple[Call, int]]:
    found = []
    while waiting.depth:
        found += waiting.take(1)
    return found


def test_a_batch_holds_something_of_each_source() -> None:
    waiting = lane(*(call("flood", 1) for _ in range(50)), call("other", 1))
    assert "other" in {found.source for found, _ in waiting.take(4)}


def test_a_source_has_its_turns_by_what_its_inputs_cost() -> None:
    """One whose inputs cost a hundred times as much has one for a hundred of the other's."""
    waiting = lane(call("giants", 50, 100.0), call("small", 200))
    order = [found.source for found, _ in one_by_one(waiting)]
    assert order[:2] == ["giants", "small"]
    assert order[: order.index("giants", 1)].count("small") == 100
    assert order[:202].count("small") == 200
    # So are callers of one source among themselves.
    large, small = call("one", 5, 50.0), call("one", 50)
    mine = [found for found, _ in one_by_one(lane(large, small))]
    assert mine[: mine.index(large, 1)].count(small) == 50


def test_one_that_comes_later_begins_where_the_others_are() -> None:
    waiting = lane(call("first", 1_000))
    for _ in range(500):
        waiting.take(1)
    waiting.add(call("later", 1_000))
    taken = [waiting.take(1)[0][0].source for _ in range(100)]
    assert 49 <= taken.count("later") <= 51


def test_a_batch_costs_no_more_than_its_budget_and_holds_an_input_at_least() -> None:
    waiting = lane(call("one", 3, 5.0), call("other", 40))
    assert [found.source for found, _ in waiting.take(32, budget=4.0)] == ["one"]
    assert [found.source for found, _ in waiting.take(32, budget=4.0)] == ["other"] * 4
    assert waiting.depth == 2 + 36
    assert waiting.cost == 46.0
    assert sum(len(waiting.take(32, budget=7.0)) for _ in range(7)) == 38
    assert (waiting.depth, waiting.cost) == (0, 0.0)


def test_what_is_ahead_is_counted_by_cost() -> None:
    waiting = lane(call("giants", 100, 100.0), call("third", 2, 2.0))
    assert waiting.ahead("small", 1.0) == 1.0 + 1.0
    assert waiting.ahead("small", 200.0) == 200.0 + 4.0
    assert waiting.ahead("third", 1.0) == 4.0 + 5.0
    assert waiting.ahead("giants", 1.0) == 10_000.0 + 4.0


def test_what_is_ahead_of_a_source_is_no_flood() -> None:
    waiting = lane(*(call("flood", 1) for _ in range(500)), call("third", 2))
    assert waiting.ahead("flood", 1) == 502
    assert waiting.ahead("other", 1) == 2
    assert waiting.ahead("third", 1) == 2 + 3
    assert lane().ahead("other", 5) == 0


def test_a_source_has_its_share_of_a_full_queue() -> None:
    waiting: Priority[Call] = Priority(threading.Lock())
    for _ in range(100):
        waiting.light.add(call("flood", 1))
    assert not waiting.has_share("flood", 1, 100)
    assert waiting.has_share("other", 50, 100)
    assert not waiting.has_share("other", 51, 100)
    waiting.heavy.add(call("other", 50))
    assert waiting.depth == 150
    assert waiting.has_share("third", 33, 100)
    assert not waiting.has_share("third", 34, 100)
    # However many sources there are.
    for number in range(50):
        waiting.heavy.add(call(f"more{number}", 1))
    assert not waiting.has_share("last", 1, 100)


COSTS = st.sampled_from([1.0, 1.7, 40.0])


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 5), COSTS, st.booleans()), max_size=30),
    st.integers(1, 7),
    st.sampled_from([0.0, 3.0, 100.0]),
)
def test_every_input_is_taken_once_in_its_order_or_removed(
    calls: list[tuple[str, int, float, bool]], room: int, budget: float
) -> None:
    made = [(call(source, count, cost), gone) for source, count, cost, gone in calls]
    waiting = lane(*(one for one, _ in made))
    taken = waiting.take(room, budget)
    for one, gone in made:
        if gone:
            waiting.remove(one)
            waiting.remove(one)
    while waiting.depth:
        more = waiting.take(room, budget)
        assert 0 < len(more) <= room
        assert len(more) == 1 or sum(found.costs[place] for found, place in more) <= budget + 1e-9
        taken += more
    assert waiting.take(room) == []
    assert waiting.cost == 0.0
    for one, gone in made:
        places = [index for found, index in taken if found is one]
        assert places == list(range(len(places)))
        assert gone or len(places) == len(one.costs)

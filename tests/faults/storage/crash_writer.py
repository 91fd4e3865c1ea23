"""A process that only stores: it publishes files, commits what refers to them, and says what it has done.

`python -m tests.faults.storage.crash_writer URL STORE TIMES SEED` kills such processes at random instants,
and writes what it found as JSON. A process is forked, not started: a kill takes milliseconds.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial

from adapters.registry.errors import AdapterExists, RevisionMoved, UnknownAdapter
from adapters.registry.records import Change, Creation, ExampleWrite, NewVersion
from adapters.registry.registry import Registry, new_uid
from adapters.storage.artifact import Artifact, Store, StoreError
from adapters.storage.open import open_store
from adapters.storage.sweeper import Swept, sweep

TENANT = "acme"
_TEXTS = Creation("minilm-l6-v2", "f" * 64, "text", "classification", keep_inputs=True)
_KILLS_PER_ADAPTER = 40
# Before the kill; then it comes at any instant of this time, in which one to three more are begun.
_MOST_COMMITS = 4
_LONGEST_SECONDS = 0.04


@dataclass
class Stored:
    """Findings after the kills. The lists are empty if every promise was kept."""

    seed: int
    kills: int = 0
    acknowledged: int = 0
    swept: int = 0
    lost: list[str] = field(default_factory=list)
    broken_rows: list[str] = field(default_factory=list)
    numbers_wrong: list[str] = field(default_factory=list)
    unswept: list[str] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """True if every promise was kept."""
        return not (self.lost or self.broken_rows or self.numbers_wrong or self.unswept)


def store_one(registry: Registry, store: Store, adapter: str, example: str) -> int:
    """Adds an example and a version with files of their own; its number.

    Begins anew where another was faster; what it published in vain is deleted.
    """
    while True:
        change = _begun(registry, adapter)
        content = f"{adapter} {example} "
        # The files have different lengths, and more than one page.
        blobs = [(content + part).encode() * 200 for part in ("segment", "inputs", "head", "evidence")]
        segment, inputs, head, evidence = published = store.publish_all(TENANT, change.uid, blobs)
        change = replace(
            change,
            upserts=(ExampleWrite(example, "d" * 64, "cat", segment, 0, inputs),),
            version=NewVersion("linear_probe", head, evidence, {"accuracy": 0.5}, labels=2),
            promote=True,
        )
        try:
            committed = registry.commit(change)
        except (RevisionMoved, AdapterExists):
            store.delete(TENANT, change.uid, published)
            continue
        store.delete(TENANT, change.uid, committed.unreferenced)
        assert committed.version is not None
        return committed.version.number


def _begun(registry: Registry, adapter: str) -> Change:
    try:
        found = registry.adapter(TENANT, adapter)
    except UnknownAdapter:
        return Change(TENANT, adapter, new_uid(), 0, create=_TEXTS)
    return Change(TENANT, adapter, found.uid, found.revision)


def read_all(registry: Registry, store: Store, uid: str) -> list[str]:
    """The faults of the files that the adapter's rows refer to."""
    wrong = []
    for artifact in registry.referenced(uid):
        try:
            store.read(TENANT, uid, artifact)
        except StoreError as error:
            wrong.append(str(error))
    return wrong


def run(url: str, place: Callable[[], Store], times: int, seed: int) -> Stored:
    """Kills `times` processes that store under the database and the store."""
    rng, found = random.Random(seed), Stored(seed)
    said: dict[str, dict[str, int]] = defaultdict(dict)
    _warm(url, place)
    for number in range(times):
        adapter = f"a{number // _KILLS_PER_ADAPTER}"
        work = partial(_go_on, url, place, adapter, str(number))
        told = _killed(work, rng.randrange(_MOST_COMMITS), rng.uniform(0.0, _LONGEST_SECONDS))
        found.kills += 1
        said[adapter] |= told
        _look(url, place(), adapter, said[adapter], found)
    found.acknowledged = sum(len(told) for told in said.values())
    _look_at_the_end(url, place(), said, found)
    return found


def _warm(url: str, place: Callable[[], Store]) -> None:
    """Everything is imported once and every statement compiled, not in each process anew."""
    registry = Registry(url)
    try:
        store_one(registry, place(), "warm", "warm")
    finally:
        registry.close()


def _go_on(url: str, place: Callable[[], Store], adapter: str, mark: str, pipe: int) -> None:
    """Stores until it is killed; after each commit, and not before, a line says its example and number.

    A first line, which is empty, says that it begins.
    """
    registry, store = Registry(url), place()
    os.write(pipe, b"\n")
    for number in range(1_000_000):
        example = f"{mark}-{number}"
        version = store_one(registry, store, adapter, example)
        os.write(pipe, f"{example} {version}\n".encode())


def _killed(work: Callable[[int], None], commits: int, seconds: float) -> dict[str, int]:
    """Kill the writer some seconds after some commits; the versions that it acknowledged, by example."""
    receiver, sender = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.close(receiver)
            work(sender)
        finally:
            os._exit(1)
    os.close(sender)
    with os.fdopen(receiver, "rb") as pipe:
        told = [pipe.readline() for _ in range(1 + commits)]
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        # A line is one write of less than a pipe takes at once: it is whole or not there.
        told += pipe.readlines()
    if not os.WIFSIGNALED(status):
        raise RuntimeError("The process ended by itself; its standard error says why.")
    lines = b"".join(told).decode().splitlines()
    return {example: int(number) for example, number in (line.split() for line in lines if line)}


def _look(url: str, store: Store, adapter: str, told: dict[str, int], found: Stored) -> None:
    """Is everything there that was said to be, and whole?"""
    registry = Registry(url)
    try:
        try:
            record = registry.adapter(TENANT, adapter)
        except UnknownAdapter:
            found.lost.extend(f"{adapter} {example}" for example in told)
            return
        kept = {example.id for example in registry.all_examples(record.uid)[1]}
        found.lost.extend(f"{adapter} {example}" for example in sorted(told.keys() - kept))
        found.broken_rows.extend(f"{adapter}: {wrong}" for wrong in read_all(registry, store, record.uid))
        numbers = [version.number for version in registry.versions(record.uid)]
        latest = max(told.values(), default=0)
        # A commit is one example and one version, whether or not it was told of.
        if len(set(told.values())) != len(told) or max(numbers) != len(kept) or record.live != max(numbers):
            found.numbers_wrong.append(f"{adapter}: {numbers}, live {record.live}, {len(kept)} examples")
        if max(numbers) < latest:
            found.lost.append(f"{adapter} version {latest}")
    finally:
        registry.close()


def _look_at_the_end(url: str, store: Store, said: dict[str, dict[str, int]], found: Stored) -> None:
    """A sweep takes what the kills left, and nothing else."""
    registry = Registry(url)
    try:
        while (swept := sweep(store, registry, older_than=-60.0)) != Swept():
            found.swept += swept.aside + swept.deleted
        referenced: set[Artifact] = set()
        for record in registry.adapters(TENANT, limit=1_000):
            _look(url, store, record.name, said[record.name], found)
            referenced |= registry.referenced(record.uid)
        left = {one.name for one in store.objects()}
        found.unswept.extend(sorted(left - {artifact.name for artifact in referenced}))
    finally:
        registry.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes what a run found; 1 if a promise was broken."""
    url, place, times, seed = sys.argv[1:] if arguments is None else arguments
    found = run(url, partial(open_store, place), int(times), int(seed))
    print(json.dumps(asdict(found)))
    return 0 if found.sound else 1


if __name__ == "__main__":
    raise SystemExit(main())

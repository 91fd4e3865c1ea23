"""Backbones of texts beside each other: accuracy of our head in several languages, speed and memory.

A backbone that is not in the model store is exported first. One that cannot be, because a package is missing
or nothing has its name, is reported as missing, and the others are measured all the same.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from adapters.probe.label_names import names_of_texts
from benchmarks.data import datasets
from benchmarks.data.archives import DEFAULT_FOLDER
from benchmarks.data.embeddings import CHARACTERS, embed, embedded
from benchmarks.data.label_names import LABEL_NAMES, NAMES_IN_ANOTHER_LANGUAGE
from benchmarks.data.spoken_names import TRUE
from benchmarks.harness.report import Report, Spread, table
from benchmarks.harness.service_process import resident
from benchmarks.training.few_shot import MANY, Cell, drawn
from benchmarks.training.heads import HEADS, NAMES_ALONE, OURS, heads_with_names
from models.backbone import Backbone
from models.feeds import typical_inputs
from models.spec import UnknownBackbone
from models.store.exports import find

BACKBONES = ("minilm-l6-v2", "multilingual-e5-small", "use-multilingual-v3", "all-mpnet-base-v2")
"""The first is what the others are measured beside."""
ENGLISH = (
    "trec-coarse",
    "20-newsgroups",
    "opinions-products",
    "opinions-films",
    "opinions-tweets",
    "chatter-en",
)
OTHERS = ("reviews-nl", "reviews-fr", "reviews-de", "sayings-de", "emoji-words-nl", "emoji-words-de")
SIZES = (2, 10, MANY)
_SEEDS = {2: 5, 10: 5, MANY: 2}
_FROM_EACH_SET = 2_000
_ROUNDS = 5
_SHORT, _LONG = "trec-coarse", "20-newsgroups"
_LONE_TEXTS = 50
_TEXTS = 128


@dataclass(frozen=True, slots=True)
class Missing:
    """A backbone that could not be exported, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Speed:
    """One backbone in a process of its own, on two threads.

    lone: milliseconds of a short text. short, long: texts a second where many are embedded. opened, used:
    MB that opening it added to the process, and that it and the batches added.
    """

    lone: Spread
    short: Spread
    long: Spread
    opened: float
    used: float


def exported(names: Sequence[str]) -> tuple[list[str], list[Missing]]:
    """Export what is not in the model store; the names that are there now, and the missing ones."""
    present, missing = [], []
    for name in names:
        try:
            stored = find(name) is not None
        except UnknownBackbone:
            missing.append(Missing(name, "no backbone has this name"))
            continue
        if not stored:
            print(f"exporting {name}", flush=True)
            command = [sys.executable, "-m", "models.export", name]
            run = subprocess.run(command, capture_output=True, text=True)
            if run.returncode:
                lines = run.stderr.strip().splitlines() or ["the export failed"]
                missing.append(Missing(name, lines[-1]))
                continue
        present.append(name)
    return present, missing


_opened: dict[str, Backbone] = {}


def open_backbone(name: str) -> float:
    """Open the backbone in this process; the MB that this added."""
    export = find(name)
    assert export is not None
    before = resident(os.getpid())
    _opened[name] = Backbone.open(export, threads=2)
    return (resident(os.getpid()) - before) / (1 << 20)


def seconds_of(name: str, texts: Sequence[str], together: int) -> float:
    """Embed the texts, some together; the seconds that it took."""
    begun = time.perf_counter()
    for first in range(0, len(texts), together):
        _opened[name].embed(texts[first : first + together])
    return time.perf_counter() - begun


def resident_megabytes() -> float:
    """The memory of this process."""
    return resident(os.getpid()) / (1 << 20)


def speeds(names: Sequence[str], folder: Path) -> dict[str, Speed]:
    """Measure the backbones in turn, round by round, each in its own process."""
    short, long = (_texts(name, folder) for name in (_SHORT, _LONG))
    taken: dict[str, dict[str, list[float]]] = {name: {"lone": [], "short": [], "long": []} for name in names}
    with ExitStack() as stack:
        workers = {name: stack.enter_context(ProcessPoolExecutor(1, get_context("spawn"))) for name in names}
        # Imports are not the backbone's memory.
        bare = {name: worker.submit(resident_megabytes).result() for name, worker in workers.items()}
        opened = {name: worker.submit(open_backbone, name).result() for name, worker in workers.items()}
        for _ in range(_ROUNDS):
            for name, worker in workers.items():
                lone = worker.submit(seconds_of, name, short[:_LONE_TEXTS], 1).result()
                taken[name]["lone"].append(1_000.0 * lone / _LONE_TEXTS)
                for what, texts in (("short", short), ("long", long)):
                    seconds = worker.submit(seconds_of, name, texts, len(texts)).result()
                    taken[name][what].append(len(texts) / seconds)
        used = {name: worker.submit(resident_megabytes).result() for name, worker in workers.items()}
    return {
        name: Speed(
            lone=Spread(tuple(taken[name]["lone"])),
            short=Spread(tuple(taken[name]["short"])),
            long=Spread(tuple(taken[name]["long"])),
            opened=opened[name],
            used=used[name] - bare[name],
        )
        for name in names
    }


def _texts(name: str, folder: Path) -> list[str]:
    samples = datasets.stratified_order(datasets.load(name, folder).samples, 0)[:_TEXTS]
    return [str(sample.input)[:CHARACTERS] for sample in samples]


def accuracies(name: str, sets: Sequence[str], folder: Path) -> dict[Cell, float]:
    """The accuracy of our head on the backbone's embeddings, the mean over seeds."""
    found = {}
    for one in sets:
        data = embedded(one, folder, most=_FROM_EACH_SET, backbone=name)
        for size in SIZES:
            if size == MANY and len(data.rows) < 1.5 * MANY:
                continue
            scores = []
            for seed in range(_SEEDS[size]):
                learned, tested = drawn(data, size, seed)
                answers = HEADS[OURS](data.rows[learned], data.labels[learned], data.rows[tested])
                scores.append(float((answers == data.labels[tested]).mean()))
            found[Cell(one, size)] = float(np.mean(scores))
    return found


def names_alone(name: str, folder: Path) -> dict[str, float]:
    """The accuracy of the nearest label name, by the set, and by the set and the language of other names."""
    asked = {one: (one, LABEL_NAMES[one]) for one in (*ENGLISH, *OTHERS)}
    asked |= {f"{one} in {code}": (one, names) for (one, code), names in NAMES_IN_ANOTHER_LANGUAGE.items()}
    texts = list(dict.fromkeys(text for _, names in asked.values() for text in names.values()))
    vectors = dict(zip(texts, embed(name, texts), strict=True))
    centre = embed(name, typical_inputs("text")).mean(axis=0)
    found = {}
    for title, (one, names) in asked.items():
        data = embedded(one, folder, most=_FROM_EACH_SET, backbone=name)
        learned, tested = drawn(data, 1, 0)
        labels = np.unique(data.labels[learned])
        said = names_of_texts({label: vectors[names[label]] for label in labels.tolist()}, centre)
        head = heads_with_names({TRUE: said})[NAMES_ALONE]
        answers = head(data.rows[learned], data.labels[learned], data.rows[tested])
        found[title] = float((answers == data.labels[tested]).mean())
    return found


def _shown(sizes: Sequence[int]) -> list[str]:
    return [f"{size:,} in all" if size == MANY else f"{size} a label" for size in sizes]


def _told(
    report: Report,
    found: Mapping[str, Mapping[Cell, float]],
    named: Mapping[str, Mapping[str, float]],
    measured: Mapping[str, Speed],
    missing: Sequence[Missing],
) -> None:
    head = ["backbone"]
    rows = [[name] for name in found]
    for group, sets in (("English", ENGLISH), ("other languages", OTHERS)):
        head += [f"{group}, {size}" for size in _shown(SIZES)]
        for row in rows:
            cells = found[row[0]]
            for size in SIZES:
                own = [cells[Cell(one, size)] for one in sets if Cell(one, size) in cells]
                row.append(f"{np.mean(own):.3f}" if own else "")
    report.add("Accuracy of our head, mean over sets", table(head, rows))
    for size, shown in zip(SIZES, _shown(SIZES), strict=True):
        shared = [one for one in (*ENGLISH, *OTHERS) if all(Cell(one, size) in own for own in found.values())]
        lines = [[name, *(f"{own[Cell(one, size)]:.3f}" for one in shared)] for name, own in found.items()]
        report.add(f"Accuracy by set, {shown}", table(["backbone", *shared], lines))
    titles = list(next(iter(named.values()), {}))
    lines = [[title, *(f"{own[title]:.3f}" for own in named.values())] for title in titles]
    report.add("Accuracy of the nearest label name", table(["names of", *named], lines))
    head = [
        "backbone",
        "ms alone",
        "short texts a second",
        "long texts a second",
        "long of the first",
        "MB opened",
        "MB used",
    ]
    first = next(iter(measured.values())).long.values if measured else ()
    lines = [
        [
            name,
            speed.lone.text(),
            speed.short.text(".0f"),
            speed.long.text(".0f"),
            f"{np.median(np.divide(speed.long.values, first)):.2f}",
            f"{speed.opened:.0f}",
            f"{speed.used:.0f}",
        ]
        for name, speed in measured.items()
    ]
    report.add("Speed on two threads, and memory", table(head, lines))
    if missing:
        report.add("Missing", table(["backbone", "why"], [[one.name, one.reason] for one in missing]))
    report.data |= {
        "accuracy": {
            name: [{**asdict(cell), "accuracy": value} for cell, value in own.items()]
            for name, own in found.items()
        },
        "names_alone": {name: dict(own) for name, own in named.items()},
        "speed": {name: asdict(speed) for name, speed in measured.items()},
        "missing": [asdict(one) for one in missing],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the backbones and write benchmarks/results/backbones.md and .json; 1 if none could be."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training.backbones", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("backbones", nargs="*", default=BACKBONES, help=f"by default {', '.join(BACKBONES)}")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("TOPWORK_DATA", DEFAULT_FOLDER)))
    options = parser.parse_args(arguments)
    report = Report("backbones", "Backbones of texts")
    names, missing = exported(options.backbones)
    with threadpool_limits(1):
        found = {name: accuracies(name, (*ENGLISH, *OTHERS), options.data) for name in names}
    named = {name: names_alone(name, options.data) for name in names}
    _told(report, found, named, speeds(names, options.data), missing)
    report.expect("backbones that could be measured", len(names), ">=", 1)
    return report.finish()


if __name__ == "__main__":
    raise SystemExit(main())

"""Promotion, offline: adapters that grow by appends of right and of wrong examples.

A run is a first fit and appends. Each append makes a version, and promotion decides on it as in the service.
The truth is the live version's score on inputs that are never taught.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import cast

import numpy as np
from numpy.typing import NDArray

from adapters.adaptation.promotion.agreement import ask
from adapters.adaptation.promotion.decision import Decision, Promote, best_of, decide, remember, unlearned
from adapters.examples.target import Target, Task
from adapters.heads.head import Head
from adapters.probe.fit import Dataset, fit
from adapters.storage.formats import Evidence
from models.arrays import Floats

FINGERPRINT = "0" * 64


@dataclass(frozen=True, slots=True)
class Inputs:
    """Inputs with their right targets: embeddings float32 (n, dim), distinct digests."""

    task: Task
    embeddings: Floats
    targets: Sequence[Target]
    digests: Sequence[str]


@dataclass(frozen=True, slots=True)
class Plan:
    """A run: how many examples it starts with, its appends, the share of their labels that is wrong.

    begins: the first append that has wrong ones. tested: how many inputs are kept for the test.
    """

    start: int = 100
    appends: int = 20
    size: int = 10
    wrong: float = 0.0
    begins: int = 0
    tested: int = 1000


@dataclass(frozen=True, slots=True)
class Version:
    """A fitted version with all that a later one is compared with."""

    number: int
    head: Head
    evidence: Evidence


@dataclass(frozen=True, slots=True)
class Run:
    """The outcome of a plan.

    scores: of the live version after the start and after each append. newest: of the version fitted there,
    whether or not it went live. decisions: on each append.
    """

    scores: tuple[float, ...]
    newest: tuple[float, ...]
    decisions: tuple[Decision, ...]

    @property
    def withheld(self) -> int:
        """How many appends were withheld."""
        return sum(not decision.promote for decision in self.decisions)


def run(inputs: Inputs, plan: Plan, seed: int) -> Run:
    """One run on inputs in an order of their own."""
    random = np.random.default_rng(seed)
    order = random.permutation(len(inputs.targets))
    rows, test = order[: -plan.tested], order[-plan.tested :]
    targets = list(inputs.targets)
    taught = plan.start
    live = step(inputs, targets, rows[:taught])[0]
    versions, truth = {1: live}, {1: score(inputs, live.head, test)}
    decisions, scores = [], [truth[1]]
    newest = list(scores)
    for append in range(plan.appends):
        added = rows[taught : taught + plan.size]
        if append >= plan.begins:
            corrupt(inputs, targets, added, plan.wrong, random)
        taught += len(added)
        version, decision = step(inputs, targets, rows[:taught], live, versions, number=append + 2)
        versions[version.number], truth[version.number] = version, score(inputs, version.head, test)
        live = version if decision.promote else versions[decision.fallback or live.number]
        decisions.append(decision)
        newest.append(truth[version.number])
        scores.append(truth[live.number])
    return Run(tuple(scores), tuple(newest), tuple(decisions))


def step(
    inputs: Inputs,
    targets: Sequence[Target],
    rows: NDArray[np.int64],
    live: Version | None = None,
    versions: Mapping[int, Version] = MappingProxyType({}),
    *,
    number: int = 1,
    promote: Promote = "if_better",
) -> tuple[Version, Decision]:
    """A version fitted on the rows with these targets (n, for all inputs), and the decision on it.

    versions: the earlier ones by number, the live one among them.
    """
    own, digests = [targets[row] for row in rows], [inputs.digests[row] for row in rows]
    embeddings = inputs.embeddings[rows]
    fitted = fit(Dataset(embeddings, own, digests, inputs.task, FINGERPRINT))
    evidence = Evidence(tuple(digests), tuple(digests), tuple(own), fitted.scores)
    if live is not None:
        best, known = best_of(live.evidence, live.number)
        new = unlearned(inputs.task, evidence, known)
        head = versions.get(best, live).head
        said = ask(inputs.task, head, known, embeddings[new], [own[row] for row in new]) if new else None
        evidence = remember(evidence, live.evidence, live.number, new, said)
    decision = decide(promote, inputs.task, evidence, None if live is None else live.evidence)
    if not decision.proved:
        evidence = replace(evidence, history=None)
    return Version(number, fitted.head, evidence), decision


def corrupt(
    inputs: Inputs,
    targets: list[Target],
    rows: NDArray[np.int64],
    share: float,
    random: np.random.Generator,
) -> None:
    """Give this share of the rows the target of another input that has another target."""
    for row in random.choice(rows, round(share * len(rows)), replace=False):
        others = [target for target in inputs.targets if target != inputs.targets[row]]
        targets[row] = others[random.integers(len(others))]


def score(inputs: Inputs, head: Head, rows: NDArray[np.int64]) -> float:
    """A head's score on these inputs: accuracy, share of exact matches, or R²."""
    predictions = head.predict(inputs.embeddings[rows])
    truth = [inputs.targets[row] for row in rows]
    if inputs.task == "regression":
        assert predictions.values is not None
        values = np.array(truth, np.float64)
        return float(1.0 - ((predictions.values - values) ** 2).sum() / ((values - values.mean()) ** 2).sum())
    names = head.labels
    if inputs.task == "classification":
        answers: list[Target] = [names[top] for top in predictions.answers]
    else:
        assigned = cast("NDArray[np.bool_]", predictions.assigned)
        answers = [tuple(names[label] for label in np.flatnonzero(row)) for row in assigned]
    return float(np.mean([answer == target for answer, target in zip(answers, truth, strict=True)]))

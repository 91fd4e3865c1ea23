"""Accuracy, honesty and abstention of the running service on real data, beside what people would use instead.

python -m benchmarks.training.quality [group ...]     # all groups by default
"""

from __future__ import annotations

import secrets
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.data import baselines
from benchmarks.harness import client, metrics
from benchmarks.harness.options import asked
from benchmarks.harness.report import Report, Spread, table
from benchmarks.training import splits
from benchmarks.training.splits import Split

Array = NDArray[np.float64]

# Means over an experiment's seeds.
ACCURACY_TARGETS = {
    "Tux Paint, 5 a class": 0.78,
    "Tux Paint, 70/30": 0.85,
    "TREC, 6 classes": 0.80,
    "20 Newsgroups, 10 a class": 0.63,
    "20 Newsgroups, full": 0.76,
    "emoji, Google to unseen Twitter": 0.50,
}
SPAM_F1_TARGET = 0.93
WORST_BELOW_LOGISTIC = 0.005
COVERAGE_TARGET = 0.90
COVERAGE_RUNS = 40
CALIBRATION_TARGET = 0.05
LARGE_TEST = 1_500
ABSTENTION_TARGET = 0.90


@dataclass(frozen=True, slots=True)
class Outcome:
    """Results of the service and the baselines on one split.

    confidence, correct: (tests,). worlds: AUROC of the abstention score by world, against the test inputs.
    """

    split: Split
    accuracy: float
    spam_f1: float | None
    logistic: float
    logistic_spam_f1: float | None
    plain: float | None
    majority: float
    reported: float
    interval: tuple[float, float]
    confidence: Array
    correct: Array
    abstained: Array
    worlds: Mapping[str, float]
    seconds: Mapping[str, float]

    @property
    def covered(self) -> bool:
        """True if the reported interval contains the test accuracy."""
        return self.interval[0] <= self.accuracy <= self.interval[1]

    @property
    def calibration_error(self) -> float:
        """Over the test inputs."""
        return metrics.calibration_error(self.confidence, self.correct)

    @property
    def calibration_limit(self) -> float:
        """The allowed calibration error at this size of test set."""
        if len(self.correct) >= LARGE_TEST:
            return CALIBRATION_TARGET
        return metrics.calibrated_limit(self.confidence)


def _share(predicted: Sequence[str], true: Sequence[str]) -> float:
    return float(np.mean([a == b for a, b in zip(predicted, true, strict=True)]))


def _doubt(predictions: Sequence[Mapping[str, Any]]) -> Array:
    return np.array([prediction["abstention_score"] for prediction in predictions])


def measure(split: Split, service: client.Client, embeddings: baselines.Embeddings) -> Outcome:
    """Adapts and predicts through the service, then runs the baselines on the same split."""
    clock = [time.perf_counter()]
    adapter = f"quality-{secrets.token_hex(6)}"
    report = service.adapt(adapter, split.train)["report"]
    clock.append(time.perf_counter())
    predictions = service.predict(adapter, split.test)
    clock.append(time.perf_counter())
    doubt = _doubt(predictions)
    worlds = {
        name: metrics.auroc(_doubt(service.predict(adapter, samples)), doubt)
        for name, samples in split.worlds.items()
    }
    service.delete(adapter)
    true = [sample.label for sample in split.test]
    answers = [prediction["label"] for prediction in predictions]
    clock.append(time.perf_counter())
    logistic = baselines.logistic_regression_cv(
        embeddings.of(split.kind, split.train), [sample.label for sample in split.train],
        embeddings.of(split.kind, split.test),
    )  # fmt: skip
    plain = baselines.without_backbone(split.kind, split.train, split.test) if split.headline else None
    clock.append(time.perf_counter())
    spam = "spam" in true
    return Outcome(
        split=split,
        accuracy=_share(answers, true),
        spam_f1=metrics.f1(answers, true, "spam") if spam else None,
        logistic=_share(logistic, true),
        logistic_spam_f1=metrics.f1(logistic, true, "spam") if spam else None,
        plain=None if plain is None else _share(plain, true),
        majority=_share(baselines.majority(split.train, split.test), true),
        reported=report["accuracy"],
        interval=(report["accuracy_interval"][0], report["accuracy_interval"][1]),
        confidence=np.array([prediction["confidence"] for prediction in predictions]),
        correct=np.array([float(a == b) for a, b in zip(answers, true, strict=True)]),
        abstained=np.array([float(prediction["abstained"]) for prediction in predictions]),
        worlds=worlds,
        seconds=dict(zip(("adapt", "predict", "worlds", "baselines"), np.diff(clock).tolist(), strict=True)),
    )


def _accuracy(report: Report, grouped: Mapping[str, Sequence[Outcome]]) -> None:
    rows = []
    differences = []
    for name, runs in grouped.items():
        ours = Spread(tuple(run.accuracy for run in runs))
        theirs = Spread(tuple(run.logistic for run in runs))
        plain = [run.plain for run in runs if run.plain is not None]
        differences.append(ours.mean - theirs.mean)
        first = runs[0].split
        rows.append([
            name, f"{len(first.train)}/{len(first.test)}", str(len(runs)),
            f"{ours.mean:.3f} ({min(ours.values):.3f}-{max(ours.values):.3f})", f"{theirs.mean:.3f}",
            f"{100 * differences[-1]:+.2f}", f"{np.mean(plain):.3f}" if plain else "",
            f"{np.mean([run.majority for run in runs]):.3f}",
        ])  # fmt: skip
        if name in ACCURACY_TARGETS:
            report.expect(f"accuracy: {name}", ours.mean, ">=", ACCURACY_TARGETS[name])
    head = ["experiment", "train/test", "runs", "Topwork (range)", "LogisticRegressionCV", "points ahead",
            "TF-IDF or pixels", "majority"]  # fmt: skip
    report.add("Accuracy on unseen inputs, mean over seeds", table(head, rows))
    for name, runs in grouped.items():
        spam = [run.spam_f1 for run in runs if run.spam_f1 is not None]
        theirs_spam = [run.logistic_spam_f1 for run in runs if run.logistic_spam_f1 is not None]
        if spam:
            beside = f"{np.mean(spam):.3f}; LogisticRegressionCV {np.mean(theirs_spam):.3f}"
            report.add(f"F1 of spam: {name}", beside)
            if name == "SMS spam, 70/30":
                report.expect("F1 of spam: SMS spam, 70/30", float(np.mean(spam)), ">=", SPAM_F1_TARGET)
    worst = min(differences)
    report.expect(
        "worst experiment against LogisticRegressionCV",
        100 * worst,
        ">=",
        -100 * WORST_BELOW_LOGISTIC,
        " points",
    )
    report.expect(
        "mean of experiments against LogisticRegressionCV",
        100 * float(np.mean(differences)),
        ">=",
        0,
        " points",
    )


def _honesty(report: Report, grouped: Mapping[str, Sequence[Outcome]]) -> None:
    rows = []
    for name, runs in grouped.items():
        error = float(np.mean([run.calibration_error for run in runs]))
        limit = float(np.mean([run.calibration_limit for run in runs]))
        right = np.mean([run.correct[run.abstained == 0].mean() for run in runs if not run.abstained.all()])
        first = runs[0].split
        reported = np.mean([run.reported for run in runs])
        measured = np.mean([run.accuracy for run in runs])
        rows.append([
            name, f"{reported:.3f}", f"{measured:.3f}",
            f"{sum(run.covered for run in runs)}/{len(runs)}" + ("" if first.judges_interval else " *"),
            f"{error:.3f}", f"{limit:.3f}" + (" *" if first.shifted else ""),
            f"{np.mean([1 - run.abstained.mean() for run in runs]):.2f}", f"{right:.3f}",
        ])  # fmt: skip
        if not first.shifted:
            report.expect(f"calibration error: {name}", error, "<=", limit)
    head = ["experiment", "reported accuracy", "test accuracy", "interval holds it", "calibration error",
            "limit", "answered", "accuracy of answers"]  # fmt: skip
    note = (
        "\n\n\\* not judged: the test inputs are of another origin than the training ones, or (interval) "
        f"fewer than {splits.COVERAGE_TEST} times the examples, so that the test accuracy is noisy."
    )
    report.add("Honesty of the report, mean over seeds", table(head, rows) + note)
    judged = [run.covered for runs in grouped.values() for run in runs if run.split.judges_interval]
    if judged:
        name = f"share of {len(judged)} runs whose interval holds the test accuracy"
        report.expect(name, float(np.mean(judged)), ">=", COVERAGE_TARGET)


def _worlds(report: Report, grouped: Mapping[str, Sequence[Outcome]]) -> None:
    rows = []
    for name, runs in grouped.items():
        for world, strange in runs[0].split.worlds.items():
            areas = Spread(tuple(run.worlds[world] for run in runs))
            shown = f"{areas.mean:.3f} ({min(areas.values):.3f}-{max(areas.values):.3f})"
            rows.append([name, world, f"{len(runs[0].split.test)}/{len(strange)}", str(len(runs)), shown])
            report.expect(f"AUROC of abstention: {world} to {name}", areas.mean, ">=", ABSTENTION_TARGET)
    if rows:
        head = ["adapter", "asked about", "inputs", "runs", "AUROC (range)"]
        report.add("Inputs of another world, mean over seeds", table(head, rows))


def _line(run: Outcome) -> str:
    return (
        f"{run.split.experiment}, seed {run.split.seed}: {run.accuracy:.4f}, LogisticRegressionCV "
        f"{run.logistic:.4f}, reported {run.reported:.4f} in {run.interval[0]:.3f}-{run.interval[1]:.3f}, "
        f"{', '.join(f'{name} {seconds:.1f} s' for name, seconds in run.seconds.items())}"
    )


def _record(run: Outcome) -> dict[str, Any]:
    return {
        "experiment": run.split.experiment,
        "seed": run.split.seed,
        "train": len(run.split.train),
        "test": len(run.split.test),
        "accuracy": run.accuracy,
        "logistic_regression_cv": run.logistic,
        "without_backbone": run.plain,
        "majority": run.majority,
        "spam_f1": run.spam_f1,
        "reported": run.reported,
        "interval": run.interval,
        "covered": run.covered,
        "calibration_error": run.calibration_error,
        "calibration_limit": run.calibration_limit,
        "answered": float(1 - run.abstained.mean()),
        "worlds": dict(run.worlds),
        "seconds": dict(run.seconds),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the named groups and writes benchmarks/results/quality.md and .json; 1 if a target is missed."""
    options = asked(__doc__, splits.GROUPS, arguments)
    report = Report("quality", "Quality")
    sets = splits.Sets(options.data)
    grouped: dict[str, list[Outcome]] = defaultdict(list)
    with client.running() as server:
        service = client.Client(server)
        embeddings = baselines.Embeddings(service, options.data / "embeddings")
        for group in options.parts:
            for split in splits.GROUPS[group](sets):
                run = measure(split, service, embeddings)
                grouped[split.experiment].append(run)
                print(_line(run), file=sys.stderr, flush=True)
            embeddings.save()
        service.close()
    _accuracy(report, grouped)
    _honesty(report, grouped)
    _worlds(report, grouped)
    report.data["runs"] = [_record(run) for runs in grouped.values() for run in runs]
    if set(options.parts) == set(splits.GROUPS):
        judged = sum(run.split.judges_interval for runs in grouped.values() for run in runs)
        report.expect("runs that judge the interval", judged, ">=", COVERAGE_RUNS)
    return report.finish()


if __name__ == "__main__":
    raise SystemExit(main())

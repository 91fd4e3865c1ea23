"""Fine-tunes over HTTP beside the head that they replace, and the same network trained from random weights.

python -m benchmarks.training.finetune [part ...] [--seeds N]   # trec-coarse, latency, …

Accuracy is measured with as many training threads as there are cores, latency with the one of the settings.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data import datasets
from benchmarks.data.datasets import Sample
from benchmarks.harness import client
from benchmarks.harness.caller import Request, Timer
from benchmarks.harness.options import asked
from benchmarks.harness.report import Report, Spread, table

SEEDS = 3
SPLITS = {"trec-coarse": (1_000, 1_000), "emoji-google": (1_324, 562)}
LATENCY = "latency"
AHEAD = 3.0
HONEST = 3.0
# Share of the examples that is held out while the way of training is chosen.
HELD_OUT = 0.2
POLL_SECONDS = 2.0
CORES = len(os.sched_getaffinity(0))
# A request's time on a version with its own network, over that on a head.
PREDICT_RATIO = 1.1
PREDICTS = 200
BESIDE_RATIO = 1.3
WINDOWS = 5
WINDOW_REQUESTS = 500
# Long enough to be measured beside; it is cancelled then.
ENDLESS = {"epochs": 100, "patience": 100}


@dataclass(frozen=True, slots=True)
class Run:
    """One split: accuracies on the test, what the job said of itself, and how long it took.

    scratch: of the first split alone, for it takes as long as the job.
    """

    head: float
    tuned: float
    scratch: float | None
    reported: float
    seconds: float
    seconds_per_image: float
    promoted: bool
    predict_ratio: float


def accuracy(service: client.Client, adapter: str, test: Sequence[Sample], version: int) -> float:
    """A version's accuracy, over HTTP."""
    right = 0
    for begin in range(0, len(test), 100):
        part = test[begin : begin + 100]
        body = {
            "adapter": adapter,
            "version": version,
            "top_k": 1,
            "inputs": [client.as_input(sample) for sample in part],
        }
        found = service.request("POST", "/predict", json=body).json()["predictions"]
        right += sum(one.get("label") == sample.label for one, sample in zip(found, part, strict=True))
    return right / len(test)


def tune(service: client.Client, adapter: str) -> tuple[dict[str, Any], float]:
    """The finished job, and seconds from its submission."""
    body = {"adapter": adapter, "method": "fine_tune", "examples": []}
    job: dict[str, Any] = service.request("POST", "/adapt", json=body).json()
    begun = time.perf_counter()
    told = None
    while job["finished_at"] is None:
        time.sleep(POLL_SECONDS)
        job = service.request("GET", f"/jobs/{job['id']}").json()
        if job["progress"] and job["progress"] != told:
            told = job["progress"]
            print(f"  {time.perf_counter() - begun:.0f} s: {told}", flush=True)
    if job["state"] != "succeeded":
        raise SystemExit(f"the job {job['state']}: {job['error']}")
    return job, time.perf_counter() - begun


def predict_ratio(service: client.Client, adapter: str, sample: Sample, versions: tuple[int, int]) -> float:
    """Median time of one input on the second version over that on the first, asked in turn."""
    seconds: dict[int, list[float]] = {version: [] for version in versions}
    for turn in range(PREDICTS + 20):
        for version in versions:
            body = {"adapter": adapter, "version": version, "inputs": [client.as_input(sample)]}
            begin = time.perf_counter()
            service.request("POST", "/predict", json=body)
            if turn >= 20:
                seconds[version].append(time.perf_counter() - begin)
    first, second = (float(np.median(seconds[version])) for version in versions)
    return second / first


def from_scratch(backbone: str, train: Sequence[Sample], test: Sequence[Sample], seconds: float) -> float:
    """Accuracy of the same network trained from random weights in this process, for this time."""
    import torch

    from adapters.finetune.config import FineTuneConfig
    from adapters.finetune.data import batches, samples_of
    from adapters.finetune.full_phase import Checkpoint, Progress
    from adapters.finetune.model import Model, TrainingSet
    from adapters.finetune.trainer import fine_tune
    from adapters.heads.head import Head
    from adapters.heads.scaling import Scaling
    from models.export.loaders import load_network
    from models.spec import TOKENIZER_FILE
    from models.store.exports import find

    class TimeIsUp(Exception):
        pass

    torch.set_num_threads(CORES)
    torch.manual_seed(0)
    network = load_network(backbone)
    for module in network.forward.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    names = sorted({sample.label for sample in train})
    folder = find(backbone)
    assert folder is not None
    dim = network.spec.dim
    tokenizer = folder / TOKENIZER_FILE if network.spec.kind == "text" else None
    blank = Head(
        "classification",
        "",
        tuple(names),
        Scaling("none", np.zeros(dim, np.float32), 1.0),
        np.zeros((len(names), dim), np.float32),
        np.zeros(len(names), np.float32),
    )
    model = Model(network.forward, blank, network.spec.transform)
    labels = np.array([names.index(sample.label) for sample in train])
    samples = samples_of(network.spec, [sample.input for sample in train], tokenizer)
    training_set = TrainingSet(samples, labels, np.arange(len(train)) % 5 == 4)
    end = time.monotonic() + seconds

    def tell(progress: Progress, checkpoint: Checkpoint | None) -> None:
        if time.monotonic() > end:
            raise TimeIsUp

    config = FineTuneConfig(epochs=100, full_size_epochs=0, backbone_rate=1e-3, patience=100)
    with contextlib.suppress(TimeIsUp):
        fine_tune(model, training_set, 0.1, config, tell=tell)
    asked = samples_of(network.spec, [sample.input for sample in test], tokenizer)
    model.eval()
    with torch.inference_mode():
        answers = [model(*asked.plain(rows)).argmax(dim=1) for rows in batches(range(len(test)), 16)]
    expected = np.array([names.index(sample.label) if sample.label in names else -1 for sample in test])
    return float((torch.cat(answers).numpy() == expected).mean())


def run(server: client.Server, name: str, seed: int, folder: Path) -> Run:
    """One seed of one set."""
    count, tests = SPLITS[name]
    samples = datasets.stratified_order(datasets.load(name, folder).samples, seed)
    train, test = samples[:count], samples[count : count + tests]
    service, adapter = client.Client(server, "bench-finetune"), f"{name}-{seed}"
    probe = service.adapt(adapter, train)
    job, seconds = tune(service, adapter)
    # A job that finds nothing better makes no version, and the head stays live.
    number, before = job["version"] or probe["version"], probe["version"]
    version = service.request("GET", f"/adapters/{adapter}/versions/{number}").json()
    report = version["report"]
    tuned = report.get("fine_tune", {"epochs": 1, "refit_epochs": 0})
    trained = tuned["epochs"] * (1.0 - HELD_OUT) * count + tuned["refit_epochs"] * count
    found = Run(
        head=accuracy(service, adapter, test, before),
        tuned=accuracy(service, adapter, test, number),
        scratch=None if seed else from_scratch(probe["backbone"], train, test, seconds),
        reported=report["accuracy"],
        seconds=seconds,
        seconds_per_image=seconds / trained,
        promoted=report["promotion"]["promoted"],
        predict_ratio=predict_ratio(service, adapter, test[0], (before, number)),
    )
    service.close()
    print(f"{name}, seed {seed}: {found}", flush=True)
    return found


def beside_tunes(report: Report, folder: Path) -> None:
    """Predictions of heads, one after the other, in windows alone and windows while a fine-tune runs."""
    rows = []
    with client.running() as server:
        for name, media in (("trec-coarse", "text/plain; charset=utf-8"), ("emoji-google", "image/png")):
            samples = datasets.stratified_order(datasets.load(name, folder).samples, 0)
            service = client.Client(server, "bench-latency")
            service.adapt(f"asked-{name}", samples[:500])
            service.adapt(f"tuned-{name}", samples[:1_000])
            asked = [
                Request(
                    "POST",
                    f"/predict?adapter=asked-{name}",
                    sample.input.encode() if isinstance(sample.input, str) else sample.input,
                    {"Content-Type": media, "X-Tenant": "bench-latency"},
                )
                for sample in samples[500:550]
            ]
            window(server, asked)
            alone, beside = [], []
            for _ in range(WINDOWS):
                alone.append(window(server, asked))
                job = begun(service, f"tuned-{name}")
                beside.append(window(server, asked))
                state = service.request("GET", f"/jobs/{job}").json()["state"]
                assert state == "running", state
                ended(service, job)
            service.close()
            found = {}
            for tag, windows in (("alone", alone), ("beside a fine-tune", beside)):
                p50, p99 = (
                    Spread(tuple(1e3 * float(np.quantile(one, share)) for one in windows))
                    for share in (0.5, 0.99)
                )
                found[tag] = p99
                rows.append([name, tag, p50.text(".2f", " ms"), p99.text(".2f", " ms")])
                report.data[f"latency {name} {tag}"] = {"p50_ms": p50.values, "p99_ms": p99.values}
            ratio = found["beside a fine-tune"].median / found["alone"].median
            report.expect(f"{name}: p99 of /predict beside a fine-tune", ratio, "<=", BESIDE_RATIO)
    head = ["inputs", "", "p50 of a window", "p99 of a window"]
    note = (
        f"Windows of {WINDOW_REQUESTS} requests in turn; the fine-tune is in its second phase, on one thread."
    )
    report.add("/predict on a head, one input at a time", f"{table(head, rows)}\n\n{note}")


def window(server: client.Server, asked: list[Request]) -> list[float]:
    """Seconds of each request of a window, on a connection of its own after a few that warm up."""
    with Timer(server.url) as timer:
        timer.times(asked, 50)
        return timer.times(asked, WINDOW_REQUESTS)


def begun(service: client.Client, adapter: str) -> str:
    """The id of a fine-tune that is in its second phase by now."""
    body = {"adapter": adapter, "method": "fine_tune", "fine_tune": ENDLESS, "examples": []}
    job: dict[str, Any] = service.request("POST", "/adapt", json=body).json()
    while job["progress"] is None:
        time.sleep(0.5)
        job = service.request("GET", f"/jobs/{job['id']}").json()
        assert job["finished_at"] is None, job
    time.sleep(2.0)
    return str(job["id"])


def ended(service: client.Client, job: str) -> None:
    """Cancels the job, and waits for its end."""
    service.request("POST", f"/jobs/{job}/cancel")
    while service.request("GET", f"/jobs/{job}").json()["finished_at"] is None:
        time.sleep(0.2)


def compare(report: Report, sets: Sequence[str], seeds: int, folder: Path) -> None:
    """Accuracies of the head, the fine-tune and a network from random weights, over splits of each set."""
    rows = []
    with client.running({"TOPWORK_WORKER_THREADS": str(CORES)}) as server:
        for name in sets:
            runs = [run(server, name, seed, folder) for seed in range(seeds)]
            head, tuned, reported, seconds, each = (
                Spread(tuple(getattr(one, part) for one in runs))
                for part in ("head", "tuned", "reported", "seconds", "seconds_per_image")
            )
            scratch = next(one.scratch for one in runs if one.scratch is not None)
            rows.append(
                [
                    name,
                    f"{SPLITS[name][0]}/{SPLITS[name][1]}",
                    head.text(".3f"),
                    tuned.text(".3f"),
                    f"{100 * (tuned.mean - head.mean):+.1f}",
                    reported.text(".3f"),
                    f"{scratch:.3f}",
                    seconds.text(".0f", " s"),
                    each.text(".3f", " s"),
                ]
            )
            off = abs(reported.mean - tuned.mean)
            ratio = Spread(tuple(one.predict_ratio for one in runs)).median
            report.expect(
                f"{name}: ahead of the head", 100 * (tuned.mean - head.mean), ">=", AHEAD, " points"
            )
            report.expect(f"{name}: reported accuracy off the test's", 100 * off, "<=", HONEST, " points")
            report.expect(f"{name}: /predict over that on a head", ratio, "<=", PREDICT_RATIO)
            report.data[name] = [asdict(one) for one in runs]
    head_row = [
        "set", "train/test", "head", "fine-tuned", "points ahead", "reported", "random weights, same time",
        "wall time", "seconds an example and epoch",
    ]  # fmt: skip
    note = (
        f"{seeds} splits each; points ahead and the reported accuracy against the test's are of their means, "
        "for what one split holds out measures to two or three points. Random weights: the first split."
    )
    report.add("Accuracy on unseen inputs", f"{table(head_row, rows)}\n\n{note}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the named sets and writes benchmarks/results/finetune.md and .json; 1 if a target is missed."""
    options = asked(__doc__, [LATENCY, *SPLITS], arguments, seeds=SEEDS)
    report = Report("finetune", "Fine-tunes")
    if LATENCY in options.parts:
        beside_tunes(report, options.data)
    if sets := [name for name in SPLITS if name in options.parts]:
        compare(report, sets, options.seeds, options.data)
    return report.finish()


if __name__ == "__main__":
    raise SystemExit(main())

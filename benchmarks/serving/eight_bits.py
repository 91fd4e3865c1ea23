"""The accuracy lost to 8-bit backbones: the splits of the quality benchmark, on both, over HTTP.

python -m benchmarks.serving.eight_bits [group ...]     # all groups but the largest by default
"""

from __future__ import annotations

import secrets
import sys
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from benchmarks.harness import client
from benchmarks.harness.options import asked
from benchmarks.harness.report import Report, Spread, table
from benchmarks.training import splits
from benchmarks.training.splits import Split

SEEDS = 3
BACKBONES = {"image": "efficientnet-lite0", "text": "minilm-l6-v2"}
MOST_LOST = 1.0
LEFT_OUT = "newsgroups-full"


def accuracy(split: Split, service: client.Client, backbone: str) -> float:
    """The accuracy of an adapter on this backbone, on the split's test inputs."""
    adapter = f"bits-{secrets.token_hex(6)}"
    service.adapt(adapter, split.train, backbone)
    predictions = service.predict(adapter, split.test)
    service.delete(adapter)
    right = [one["label"] == sample.label for one, sample in zip(predictions, split.test, strict=True)]
    return float(np.mean(right))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the groups and writes benchmarks/results/eight_bits.md and .json; 1 if a target is missed."""
    options = asked(__doc__, [name for name in splits.GROUPS if name != LEFT_OUT], arguments)
    report = Report("eight_bits", "8 bits")
    sets = splits.Sets(options.data)
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    names = [name for base in BACKBONES.values() for name in (base, f"{base}-int8")]
    with client.running({"TOPWORK_BACKBONES": ",".join(names)}) as server:
        service = client.Client(server)
        for group in options.parts:
            for split in splits.GROUPS[group](sets):
                if split.seed >= SEEDS:
                    continue
                base = BACKBONES[split.kind]
                pair = (accuracy(split, service, base), accuracy(split, service, f"{base}-int8"))
                found[split.experiment].append(pair)
                print(f"{split.experiment}, seed {split.seed}: {pair}", file=sys.stderr, flush=True)
        service.close()
    rows, lost = [], []
    for name, pairs in found.items():
        single, small = (Spread(values) for values in zip(*pairs, strict=True))
        lost.append(100 * (single.mean - small.mean))
        rows.append([name, str(len(pairs)), f"{single.mean:.3f}", f"{small.mean:.3f}", f"{-lost[-1]:+.2f}"])
    head = ["experiment", "seeds", "single precision", "8 bits", "points"]
    report.add("Accuracy on unseen inputs, mean over seeds", table(head, rows))
    report.data["accuracy"] = dict(found)
    report.expect("points lost, mean of experiments", float(np.mean(lost)), "<=", MOST_LOST)
    return report.finish()


if __name__ == "__main__":
    raise SystemExit(main())

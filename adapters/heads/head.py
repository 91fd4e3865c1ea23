"""The head, which maps embeddings to one adapter's predictions: kilobytes of data, not code."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from adapters.examples.target import Task
from adapters.heads.abstention import AbstentionRule, energy, novelty_score, softmax_and_energy
from adapters.heads.answers import Predictions, alarmed, answers_of, confidence_of, nothing
from adapters.heads.novelty import NoveltyRegion
from adapters.heads.scaling import Scaling
from models.arrays import Floats
from models.errors import InternalFailure

FORMAT: Final = 3
# A head without costs and alarms is written in this format, which releases before format 3 can read.
_PLAIN_FORMAT: Final = 2
_READ: Final = (1, 2, 3)  # formats that can be read
# Weights up to this size are stored in single precision, larger ones in half: at 20 labels and 1,280
# dimensions a head then takes 70 instead of 120 kB, and a probability moves by less than 0.001.
_SINGLE_PRECISION_BYTES = 32 << 10
# Size of a head above which its region is described by fewer directions.
_HEAD_BYTES = 62 << 10


class CorruptHead(InternalFailure):
    """The bytes are not a head that this version can read."""

    code = "corrupt_head"


@dataclass(frozen=True, slots=True)
class Head:
    """Linear weights with labels, a temperature and abstention statistics, for one backbone fingerprint.

    Immutable and safe to share between threads.
    """

    task: Task
    fingerprint: str
    labels: tuple[str, ...]
    scaling: Scaling
    weight: Floats  # float32 (labels or 1, dim), for scaled features
    bias: Floats  # float32 (labels or 1,)
    temperature: float = 1.0
    doubt: AbstentionRule = field(default_factory=AbstentionRule)
    region: NoveltyRegion | None = None
    # float32 (labels,). Probability from which a multilabel label is assigned; (0,) for other tasks.
    decisions: Floats = field(default_factory=nothing)
    # float32 (labels,). How bad it is to miss a label of a classification, see answers.answers_of; (0,) if
    # all labels cost the same.
    costs: Floats = field(default_factory=nothing)
    # float32 (labels,). Probability of a label from which a classification abstains, because the label was
    # always missed; NO_ALARM for the others, (0,) without such labels.
    alarms: Floats = field(default_factory=nothing)
    # Mean and scale that turn the output of a regression into the target's unit.
    value_mean: float = 0.0
    value_scale: float = 1.0
    residual_deviation: float = 0.0  # standard deviation of leave-one-out residuals, in the target's unit
    # Share of the probability that is spread evenly over the labels (for multilabel, over yes and no), so
    # that no confidence is higher than the examples can support.
    smoothing: float = 0.0
    # Confidence from which a multilabel decision can be relied on, for labels given and labels not given.
    certain: tuple[float, float] = (0.0, 0.0)
    # False if too few examples were held out to tell how good the head is; it then always abstains.
    measured: bool = True

    @property
    def dim(self) -> int:
        """Length of the embeddings."""
        return int(self.weight.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the arrays take. In a file, large weights take half of it."""
        arrays = [self.weight, self.bias, self.scaling.mean, self.decisions, self.costs, self.alarms]
        return sum(array.nbytes for array in arrays) + (self.region.nbytes if self.region is not None else 0)

    @property
    def threshold(self) -> float:
        """The confidence below which the head abstains."""
        return self.doubt.threshold

    def predict(self, embeddings: Floats) -> Predictions:
        """Predict for embeddings, float32 (n, dim), made by the backbone with this head's fingerprint."""
        logits = self.logits(embeddings)
        n = len(logits)
        assigned, uncertain, values, chosen, energies = None, None, None, None, None
        if self.task == "regression":
            probabilities = np.zeros((n, 0), dtype=np.float32)
            confidence = np.ones(n, dtype=np.float32)
            # Double precision keeps the differences of large targets, such as points in time.
            values = logits[:, 0].astype(np.float64) * self.value_scale + self.value_mean
        elif self.task == "multilabel":
            probabilities = smoothed(sigmoid(logits), self.smoothing, 2)
            assigned = probabilities >= self.decisions
            certainty = np.where(assigned, probabilities, 1.0 - probabilities)
            uncertain = certainty < np.where(assigned, *map(np.float32, self.certain))
            confidence = certainty.min(axis=1, initial=1.0)
            energies = energy(logits, self.task)
        else:
            probabilities, energies = softmax_and_energy(logits)
            probabilities = smoothed(probabilities, self.smoothing, len(self.labels))
            if len(self.costs):
                chosen = answers_of(probabilities, self.costs)
                confidence = confidence_of(probabilities, chosen)
            else:
                confidence = np.maximum.reduce(probabilities, axis=1)
        distance, score = self._strangeness(embeddings, energies)
        abstained = (confidence < self.doubt.threshold) | (distance > 1.0)
        if len(self.alarms):
            abstained |= alarmed(probabilities, self.alarms)
        if not self.measured:
            abstained[:] = True
        if uncertain is not None:
            uncertain |= abstained[:, None]
            abstained |= uncertain.all(axis=1)
        return Predictions(
            probabilities, confidence, distance, score, abstained, assigned, uncertain, values, chosen
        )

    def logits(self, embeddings: Floats) -> Floats:
        """Logits (n, labels or 1), temperature included, of embeddings (n, dim)."""
        features = self.scaling.apply(embeddings)
        logits: Floats = features @ self.weight.T
        logits += self.bias
        if self.temperature != 1.0:
            logits /= np.float32(self.temperature)
        return logits

    def _strangeness(self, embeddings: Floats, energies: Floats | None) -> tuple[Floats, Floats]:
        """The distance and abstention_score of Predictions. `energies`: (n,), None for regression."""
        distance = np.zeros(len(embeddings), dtype=np.float32)
        # Two kinds of evidence are added where they say "strange", and all but ignored where they say
        # "familiar": a confident answer does not make a distant input any nearer.
        score = np.zeros(len(embeddings), dtype=np.float32)
        if self.region is not None:
            squared = self.region.squared_distance(embeddings)
            distance = np.sqrt(squared / np.float32(self.region.limit))
            score += novelty_score(self.region.surprise(squared))
        if energies is not None:
            score += novelty_score(self.doubt.surprise(energies))
        return distance, score

    def to_bytes(self) -> bytes:
        """The head as safetensors, with all but arrays as JSON metadata. Equal heads give equal bytes."""
        # A single key, because safetensors writes several in no fixed order.
        data: bytes = save(self._arrays(), metadata={"head": json.dumps(self._facts(), sort_keys=True)})
        return data

    def _arrays(self) -> dict[str, NDArray[Any]]:
        half = self.weight.nbytes > _SINGLE_PRECISION_BYTES
        arrays: dict[str, NDArray[Any]] = {
            "weight": self.weight.astype(np.float16) if half else self.weight,
            "bias": self.bias,
            "mean": self.scaling.mean.astype(np.float16),
            "decisions": self.decisions,
        }
        if self.region is not None:
            arrays |= self.region.arrays
        if len(self.costs):
            arrays["costs"] = self.costs
        if len(self.alarms):
            arrays["alarms"] = self.alarms
        return {name: np.ascontiguousarray(array) for name, array in arrays.items()}

    def _facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = {
            "format": FORMAT if len(self.costs) or len(self.alarms) else _PLAIN_FORMAT,
            "task": self.task,
            "fingerprint": self.fingerprint,
            "labels": self.labels,
            "transform": self.scaling.transform,
            "scale": self.scaling.scale,
            "temperature": self.temperature,
            "doubt": [self.doubt.threshold, self.doubt.energy_mean, self.doubt.energy_deviation],
            "value_mean": self.value_mean,
            "value_scale": self.value_scale,
            "residual_deviation": self.residual_deviation,
            "smoothing": self.smoothing,
            "certain": self.certain,
            "measured": self.measured,
        }
        if self.region is not None:
            facts["region"] = self.region.numbers
        return facts

    @classmethod
    def from_bytes(cls, data: bytes) -> Head:
        """Read a head that to_bytes wrote. Raises CorruptHead."""
        try:
            arrays = {name: _array(info) for name, info in deserialize(data)}  # type: ignore[no-untyped-call]
            (length,) = struct.unpack("<Q", data[:8])
            facts = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["head"])
            if facts["format"] not in _READ:
                raise CorruptHead(
                    f"The head has format {facts['format']}, this version reads up to {FORMAT}."
                )
            return cls._assembled(arrays, facts)
        except (SafetensorError, struct.error, KeyError, ValueError, TypeError) as error:
            raise CorruptHead(f"The bytes are not a head: {error}") from error

    @classmethod
    def _assembled(cls, arrays: Mapping[str, NDArray[Any]], facts: Mapping[str, Any]) -> Head:
        region = NoveltyRegion.assembled(arrays, facts["region"]) if "region" in facts else None
        head = cls(
            task=facts["task"],
            fingerprint=str(facts["fingerprint"]),
            labels=tuple(facts["labels"]),
            scaling=Scaling(facts["transform"], arrays["mean"].astype(np.float32), float(facts["scale"])),
            weight=arrays["weight"].astype(np.float32),
            bias=arrays["bias"],
            temperature=float(facts["temperature"]),
            doubt=AbstentionRule(*map(float, facts["doubt"])),
            region=region,
            decisions=arrays["decisions"],
            costs=arrays.get("costs", nothing()),
            alarms=arrays.get("alarms", nothing()),
            value_mean=float(facts["value_mean"]),
            value_scale=float(facts["value_scale"]),
            residual_deviation=float(facts["residual_deviation"]),
            # Heads of format 1 have none of these.
            smoothing=float(facts.get("smoothing", 0.0)),
            certain=(float(facts.get("certain", (0.0, 0.0))[0]), float(facts.get("certain", (0.0, 0.0))[1])),
            measured=bool(facts.get("measured", True)),
        )
        outputs = 1 if head.task == "regression" else len(head.labels)
        if head.weight.shape != (outputs, len(head.scaling.mean)) or head.bias.shape != (outputs,):
            raise CorruptHead("The shape of the weights does not match the labels and the mean.")
        if any(len(array) not in (0, len(head.labels)) for array in (head.costs, head.alarms)):
            raise CorruptHead("The costs or alarms do not match the labels.")
        return head


def storable(weight: Floats) -> Floats:
    """The weights as they will be read back, so that a new head and a stored one answer alike."""
    if weight.nbytes <= _SINGLE_PRECISION_BYTES:
        return weight
    return weight.astype(np.float16).astype(np.float32)


def directions_for(labels: int, dim: int) -> int:
    """Number of region directions that fit beside the weights in a head of 64 kB; at least 4."""
    weights = labels * dim * 4
    weights = weights if weights <= _SINGLE_PRECISION_BYTES else weights // 2
    return max(4, (_HEAD_BYTES - weights - 4 * dim) // (dim + 4 * labels))


def softmax(logits: Floats) -> Floats:
    """Probabilities (n, labels)."""
    return softmax_and_energy(logits)[0]


def sigmoid(logits: Floats) -> Floats:
    """Probabilities, each on its own."""
    result: Floats = np.reciprocal(1.0 + np.exp(-np.clip(logits, -80.0, 80.0)))
    return result


def smoothed(probabilities: Floats, share: float, outcomes: int) -> Floats:
    """Spread a share of the probabilities evenly over all outcomes. The input may be overwritten."""
    if share:
        probabilities *= np.float32(1.0 - share)
        probabilities += np.float32(share / outcomes)
    return probabilities


def _array(info: Mapping[str, Any]) -> NDArray[Any]:
    kinds: dict[str, type[np.generic]] = {"F32": np.float32, "F16": np.float16, "I8": np.int8}
    array: NDArray[Any] = np.frombuffer(info["data"], dtype=kinds[info["dtype"]]).reshape(info["shape"])
    if array.dtype != np.int8 and not math.isfinite(float(np.sum(array, dtype=np.float64))):
        raise CorruptHead("The head has numbers that are not finite.")
    return array

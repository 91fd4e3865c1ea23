"""An exported backbone with a head appended: one self-contained ONNX file, made without the onnx package.

Only the outputs of the backbone's graph are replaced.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapters.heads.answers import NO_ALARM
from adapters.heads.head import Head
from adapters.heads.novelty import NoveltyRegion
from models import protobuf
from models.arrays import Floats
from models.preprocess.text import Silence
from models.protobuf import InvalidGraph
from models.spec import IDS, MASK, OUTPUT_NAME

PROBABILITIES = "probabilities"
ANSWER = "answer"
VALUES = "values"
ASSIGNED = "assigned"
UNCERTAIN = "uncertain"
ABSTAINED = "abstained"
DISTANCE = "distance"

_PREFIX = "topwork_head_"


def append_head(
    backbone_onnx: bytes, head: Head, metadata: Mapping[str, str], silence: Silence | None = None
) -> bytes:
    """Append the head to the backbone's model, which then leads from the backbone's inputs to decisions.

    Outputs: PROBABILITIES float32 (batch, labels), or VALUES float64 (batch,) for regression; for
    classification ANSWER int64 (batch,), the index of the label answered; for multilabel ASSIGNED and
    UNCERTAIN bool (batch, labels); ABSTAINED bool (batch,) and DISTANCE float32 (batch,), all as in
    Predictions. `silence`: the tokens of a text backbone that say nothing; the model abstains on an input
    of only these. `metadata` is added to the model's metadata_props, with the labels as JSON under "labels"
    and the thresholds of _decisions_of. Raises InvalidGraph.
    """
    graph, rest = protobuf.graph_of(backbone_onnx)
    if OUTPUT_NAME.encode() not in bytes(graph):
        raise InvalidGraph(
            f"The backbone is not an ONNX model with the output {OUTPUT_NAME!r}. Export it again."
        )
    kept = [whole for number, whole, _ in protobuf.fields(graph) if number != protobuf.GRAPH_OUTPUT]
    entries = {**metadata, "labels": json.dumps(head.labels, ensure_ascii=False), **_decisions_of(head)}
    return b"".join(
        [
            *rest,
            protobuf.message(protobuf.MODEL_GRAPH, *kept, *_Appended(head, silence).fields),
            *(
                protobuf.message(protobuf.MODEL_METADATA, protobuf.text(1, key), protobuf.text(2, value))
                for key, value in sorted(entries.items())
            ),
        ]
    )


def _decisions_of(head: Head) -> dict[str, str]:
    """The thresholds by which Head.predict decides, as JSON by key.

    `measured`: if false, the head always abstains. `threshold`: probability of a classification's answer
    below which it abstains. `costs`: by label, what its probability is multiplied by to find the answer.
    `alarms`: by label, the probability from which a classification abstains. `decisions`: probability from
    which each label of a multilabel head is given. `certain`: confidence from which these decisions can be
    relied on, which is the probability of labels given, and one minus it for those not given.
    """
    facts: dict[str, object] = {"measured": head.measured}
    if head.task == "classification":
        facts["threshold"] = head.threshold
        facts["costs"] = dict(zip(head.labels, head.costs.tolist(), strict=False))
        several = zip(head.labels, head.alarms.tolist(), strict=False)
        facts["alarms"] = {label: alarm for label, alarm in several if alarm < NO_ALARM}
    elif head.task == "multilabel":
        facts["decisions"] = head.decisions.tolist()
        facts["certain"] = dict(zip(("given", "not_given"), head.certain, strict=True))
    return {key: json.dumps(value) for key, value in facts.items()}


class _Appended:
    """The graph's new fields: nodes, initializers and outputs. They compute the same as Head.predict."""

    def __init__(self, head: Head, silence: Silence | None) -> None:
        self.fields: list[bytes] = []
        self._head = head
        logits = self._logits()
        if head.task == "regression":
            self._values(logits)
            doubts = []
        else:
            probabilities = self._probabilities(logits)
            multilabel = head.task == "multilabel"
            confidence = self._multilabel(probabilities) if multilabel else self._answer(probabilities)
            doubts = [self._node("Less", confidence, self._floats(head.threshold))]
            if len(head.alarms):
                reached = self._node("GreaterOrEqual", probabilities, self._tensor(head.alarms))
                doubts.append(self._reduced("ReduceMax", reached))
        self._distance(head.region)
        # Distances are never negative, so a limit of -1 makes an unmeasured head always abstain.
        doubts.append(self._node("Greater", DISTANCE, self._floats(1.0 if head.measured else -1.0)))
        if silence is not None and silence.tokens:
            doubts.append(self._silent(silence))
        self._abstained(doubts)

    def _logits(self) -> str:
        weight, bias = _folded(self._head)
        source = OUTPUT_NAME
        if self._head.scaling.transform == "sqrt":
            source = self._node("Sqrt", self._node("Relu", source))
        return self._node("Gemm", source, self._tensor(weight), self._tensor(bias), transB=1)

    def _values(self, logits: str) -> None:
        flat = self._node("Reshape", logits, self._ints(-1))
        # Double precision keeps the differences of targets far from zero.
        double = self._node("Cast", flat, to=protobuf.DOUBLE)
        scaled = self._node("Mul", double, self._tensor(np.array(self._head.value_scale)))
        self._node("Add", scaled, self._tensor(np.array(self._head.value_mean)), output=VALUES)
        self._give(VALUES, None, protobuf.DOUBLE)

    def _probabilities(self, logits: str) -> str:
        head, multilabel = self._head, self._head.task == "multilabel"
        sharp = PROBABILITIES if not head.smoothing else None
        found = (
            self._node("Sigmoid", logits, output=sharp)
            if multilabel
            else self._node("Softmax", logits, output=sharp, axis=-1)
        )
        if head.smoothing:
            scaled = self._node("Mul", found, self._floats(1.0 - head.smoothing))
            spread = self._floats(head.smoothing / (2 if multilabel else len(head.labels)))
            self._node("Add", scaled, spread, output=PROBABILITIES)
        self._give(PROBABILITIES, len(head.labels), protobuf.FLOAT)
        return PROBABILITIES

    def _answer(self, probabilities: str) -> str:
        """Add the label answered; return its probability."""
        weighed, costs = probabilities, self._head.costs
        if len(costs):
            weighed = self._node("Mul", probabilities, self._tensor(costs))
        self._node("ArgMax", weighed, output=ANSWER, axis=1, keepdims=0)
        self._give(ANSWER, None, protobuf.INT64)
        found = probabilities
        if len(costs):
            place = self._node("Unsqueeze", ANSWER, self._ints(1))
            found = self._node("GatherElements", probabilities, place, axis=1)
        return self._node("ReduceMax", found, self._ints(1), keepdims=0)

    def _multilabel(self, probabilities: str) -> str:
        """Add a decision for each label; return the confidence of the least certain one."""
        head = self._head
        given, not_given = (self._floats(value) for value in head.certain)
        self._node("GreaterOrEqual", probabilities, self._tensor(head.decisions), output=ASSIGNED)
        against = self._node("Sub", self._floats(1.0), probabilities)
        certainty = self._node("Where", ASSIGNED, probabilities, against)
        wanted = self._node("Where", ASSIGNED, given, not_given)
        self._node("Less", certainty, wanted, output=f"{_PREFIX}doubtful")
        self._give(ASSIGNED, len(head.labels), protobuf.BOOL)
        return self._node("ReduceMin", certainty, self._ints(1), keepdims=0)

    def _distance(self, region: NoveltyRegion | None) -> None:
        """Add the distance; see NoveltyRegion.squared_distance. It is zero without a region."""
        self._give(DISTANCE, None, protobuf.FLOAT)
        if region is None:
            rows = self._node("Shape", OUTPUT_NAME, start=0, end=1)
            self._node("ConstantOfShape", rows, output=DISTANCE)
            return
        axis, zero = self._ints(1), self._floats(0.0)
        centred = self._node("Sub", OUTPUT_NAME, self._tensor(region.mean))
        lengths = self._node("ReduceSumSquare", centred, axis, keepdims=0)
        directions = region.directions.astype(np.float32) * region.steps[:, None]
        along = self._node("MatMul", centred, self._tensor(np.ascontiguousarray(directions.T)))
        inside = self._node("Mul", along, self._tensor(region.plain))
        covered = self._node("ReduceSumSquare", inside, axis, keepdims=0)
        left = self._node("Max", self._node("Sub", lengths, covered), zero)
        outside = self._node("Div", left, self._floats(region.rest))
        doubled = self._tensor(np.ascontiguousarray(-2.0 * region.centres.T))
        own = self._tensor((region.centres**2).sum(axis=1))
        apart = self._node("Add", self._node("MatMul", along, doubled), own)
        lowest = self._node("ReduceMin", apart, axis, keepdims=0)
        origin = self._node("ReduceSumSquare", along, axis, keepdims=0)
        near = self._node("Max", self._node("Add", origin, lowest), zero)
        squared = self._node("Add", near, outside)
        share = self._node("Div", squared, self._floats(region.limit))
        self._node("Sqrt", share, output=DISTANCE)

    def _silent(self, silence: Silence) -> str:
        """Whether a text has only tokens that say nothing, prompt and padding aside."""
        ids, mask = IDS, MASK
        if silence.skipped:
            bounds = (self._ints(silence.skipped), self._ints(np.iinfo(np.int64).max), self._ints(1))
            ids, mask = self._node("Slice", IDS, *bounds), self._node("Slice", MASK, *bounds)
        each = self._node("Unsqueeze", ids, self._ints(2))
        found = self._node("Cast", self._node("Equal", each, self._ints(*silence.tokens)), to=protobuf.INT64)
        silent = self._node("Mul", mask, self._node("ReduceSum", found, self._ints(2), keepdims=0))
        says = self._node("ReduceSum", self._node("Sub", mask, silent), self._ints(1), keepdims=0)
        return self._node("Equal", says, self._ints(0))

    def _abstained(self, doubts: list[str]) -> None:
        """Abstain on any doubt, or if all multilabel decisions are uncertain; a doubt makes them all so."""
        multilabel = self._head.task == "multilabel"
        reasons = doubts[0]
        for place, doubt in enumerate(doubts[1:], start=2):
            last = place == len(doubts) and not multilabel
            reasons = self._node("Or", reasons, doubt, output=ABSTAINED if last else None)
        if len(doubts) == 1 and not multilabel:
            self._node("Identity", reasons, output=ABSTAINED)
        if multilabel:
            everywhere = self._node("Unsqueeze", reasons, self._ints(1))
            self._node("Or", f"{_PREFIX}doubtful", everywhere, output=UNCERTAIN)
            self._give(UNCERTAIN, len(self._head.labels), protobuf.BOOL)
            self._reduced("ReduceMin", UNCERTAIN, output=ABSTAINED)
        self._give(ABSTAINED, None, protobuf.BOOL)

    def _reduced(self, operator: str, flags: str, output: str | None = None) -> str:
        """Add whether any (ReduceMax) or all (ReduceMin) of the flags (batch, labels) are true."""
        counted = self._node("Cast", flags, to=protobuf.INT64)
        reduced = self._node(operator, counted, self._ints(1), keepdims=0)
        return self._node("Cast", reduced, output=output, to=protobuf.BOOL)

    def _node(self, operator: str, *inputs: str, output: str | None = None, **attributes: int) -> str:
        """Add a node and return the name of its output."""
        name = output or self._name()
        self.fields.append(protobuf.node(operator, inputs, name, **attributes))
        return name

    def _tensor(self, values: NDArray[Any]) -> str:
        name = self._name()
        self.fields.append(protobuf.constant(name, values))
        return name

    def _floats(self, value: float) -> str:
        return self._tensor(np.array(value, dtype=np.float32))

    def _ints(self, *values: int) -> str:
        return self._tensor(np.array(values, dtype=np.int64))

    def _give(self, name: str, columns: int | None, kind: int) -> None:
        """Declare an output (batch,) or (batch, columns) of element type `kind`."""
        sizes = ("batch",) if columns is None else ("batch", columns)
        self.fields.append(protobuf.tensor(protobuf.GRAPH_OUTPUT, name, kind, *sizes))

    def _name(self) -> str:
        return f"{_PREFIX}{len(self.fields)}"


def _folded(head: Head) -> tuple[Floats, Floats]:
    """Weight and bias with scaling and temperature folded in."""
    unit = 1.0 / head.temperature
    weight = head.weight.astype(np.float64) * (unit / head.scaling.scale)
    bias = head.bias.astype(np.float64) * unit - weight @ head.scaling.mean.astype(np.float64)
    return weight.astype(np.float32), bias.astype(np.float32)

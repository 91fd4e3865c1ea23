"""What the names of labels add to a head, where the truth is known."""

import hashlib

import numpy as np
import pytest

from adapters.heads.head import Head
from adapters.probe.fit import Dataset, FittedProbe, OneLabel, fit
from adapters.probe.label_names import LabelNames, names_of_images, names_of_texts, unseen_offset
from models.arrays import Floats

_LABELS = tuple("abcdef")
_DIM = 64


class World:
    """Normal clouds of inputs around means, and names that lie near the means."""

    def __init__(self, seed: int, apart: float = 2.2) -> None:
        self._rng = np.random.default_rng(seed)
        means = self._rng.standard_normal((len(_LABELS), _DIM))
        self.means = apart * means / np.linalg.norm(means, axis=1, keepdims=True)

    def draw(self, per_label: int, labels: tuple[str, ...] = _LABELS) -> tuple[Floats, list[str]]:
        own = [_LABELS.index(label) for label in labels for _ in range(per_label)]
        rows = self.means[own] + self._rng.standard_normal((len(own), _DIM)) / 2.0
        return rows.astype(np.float32), [_LABELS[one] for one in own]

    def names(self, order: tuple[int, ...] = tuple(range(len(_LABELS)))) -> LabelNames:
        """Return names that say the means of the labels in this order."""
        rows = {label: self.means[one].astype(np.float32) for label, one in zip(_LABELS, order, strict=True)}
        return names_of_texts(rows, np.zeros(_DIM, np.float32))

    def opaque(self) -> LabelNames:
        rows = {label: self._rng.standard_normal(_DIM).astype(np.float32) for label in _LABELS}
        return names_of_texts(rows, np.zeros(_DIM, np.float32))


def fitted(rows: Floats, targets: list[str], names: LabelNames = LabelNames()) -> FittedProbe:
    digests = [hashlib.sha256(row.tobytes()).hexdigest() for row in rows]
    return fit(Dataset(rows.copy(), targets, digests, "classification", "f", names=names))


def accuracy(head: Head, rows: Floats, targets: list[str]) -> float:
    answers = head.predict(rows).probabilities.argmax(axis=1)
    return float(
        np.mean([head.labels[answer] == target for answer, target in zip(answers, targets, strict=True)])
    )


def test_names_alone_answer_without_an_example() -> None:
    """Version 1 needs no example: names predict far better than chance, and no score is claimed."""
    world = World(0)
    probe = fitted(np.zeros((0, _DIM), np.float32), [], world.names())
    assert accuracy(probe.head, *world.draw(50)) > 0.8
    assert probe.report["accuracy"] is None
    assert probe.report["method"] == "not measured"
    assert [warning["code"] for warning in probe.report["warnings"]] == ["labels_without_examples"]
    assert Head.from_bytes(probe.head.to_bytes()).labels == _LABELS


def test_names_help_with_one_example() -> None:
    worlds = [World(seed) for seed in range(8)]
    examples = [world.draw(1) for world in worlds]
    tests = [world.draw(50) for world in worlds]
    alone = [accuracy(fitted(*one).head, *test) for one, test in zip(examples, tests, strict=True)]
    with_names = [
        accuracy(fitted(*one, world.names()).head, *test)
        for world, one, test in zip(worlds, examples, tests, strict=True)
    ]
    assert np.mean(with_names) > np.mean(alone) + 0.1


@pytest.mark.parametrize("kind", ["swapped", "opaque"])
def test_names_that_mislead_cost_little(kind: str) -> None:
    """With four examples of each label, names of other labels or of nothing cost at most a point."""
    lost = []
    for seed in range(12):
        world = World(seed)
        examples, test = world.draw(4), world.draw(100)
        names = world.names((1, 2, 3, 4, 5, 0)) if kind == "swapped" else world.opaque()
        lost.append(accuracy(fitted(*examples).head, *test) - accuracy(fitted(*examples, names).head, *test))
    assert np.mean(lost) <= 0.01


def test_names_do_not_make_shuffled_labels_look_learned() -> None:
    """The reported accuracy is that of chance, also where the names are those of the labels."""
    reported = []
    for seed in range(24):
        world = World(seed)
        rows, targets = world.draw(5)
        shuffled = [targets[one] for one in np.random.default_rng(seed).permutation(len(targets))]
        reported.append(fitted(rows, shuffled, world.names()).report["accuracy"])
    assert np.mean(reported) < 1.0 / len(_LABELS) + 0.04


def test_scores_of_names_are_true() -> None:
    """With two examples of each label the reported accuracy is that on new inputs, on average."""
    apart = []
    for seed in range(24):
        world = World(seed, apart=1.2)
        probe = fitted(*world.draw(2), world.names())
        apart.append(probe.report["accuracy"] - accuracy(probe.head, *world.draw(100)))
    assert abs(np.mean(apart)) < 0.05


def test_label_without_examples_is_found_by_its_name() -> None:
    """Inputs of a label that has only a name get it more often than not, and others keep their answers."""
    found, kept, before = [], [], []
    for seed in range(8):
        world = World(seed)
        known = _LABELS[:-1]
        examples = world.draw(8, known)
        probe = fitted(*examples, world.names())
        found.append(accuracy(probe.head, *world.draw(50, _LABELS[-1:])))
        test = world.draw(50, known)
        kept.append(accuracy(probe.head, *test))
        before.append(accuracy(fitted(*examples).head, *test))
        assert probe.report["per_label"]["f"]["support"] == 0
    assert np.mean(found) > 0.5
    assert np.mean(kept) > np.mean(before) - 0.02


def test_labels_without_examples_and_with_opaque_names_stay_rare() -> None:
    """Names that say nothing take no answers from labels with examples."""
    lost = []
    for seed in range(8):
        world = World(seed)
        known = _LABELS[:3]
        examples, test = world.draw(6, known), world.draw(100, known)
        lost.append(
            accuracy(fitted(*examples).head, *test) - accuracy(fitted(*examples, world.opaque()).head, *test)
        )
    assert np.mean(lost) < 0.03


def test_one_label_with_examples_needs_a_second_name() -> None:
    world = World(0)
    rows, targets = world.draw(3, ("a",))
    with pytest.raises(OneLabel):
        fitted(rows, targets)
    probe = fitted(rows, targets, world.names())
    assert probe.head.labels == _LABELS
    assert accuracy(probe.head, *world.draw(50)) > 0.5


def test_the_order_of_examples_does_not_matter_with_names() -> None:
    world = World(3)
    rows, targets = world.draw(3)
    order = np.random.default_rng(0).permutation(len(rows))
    one = fitted(rows, targets, world.names())
    other = fitted(rows[order], [targets[place] for place in order], world.names())
    assert one.head.to_bytes() == other.head.to_bytes()


def test_unseen_offset_gives_as_much_probability_as_there_are_examples() -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((3, 300)).astype(np.float32)
    own = rng.integers(0, 3, 300)
    hints = rng.standard_normal((3, 300)).astype(np.float32) + 4.0
    offset = unseen_offset(logits, hints, own, np.array([True, True, True]))
    expected = 0.0
    for label in range(3):
        rest = np.delete(np.exp(logits), label, axis=0).sum(axis=0)
        alone = np.exp(hints[label] + offset)
        expected += float((alone / (alone + rest)).sum())
    assert expected == pytest.approx(300, rel=1e-3)


def test_image_names_follow_the_classes_that_they_resemble() -> None:
    """A label named like some classes is answered for images that show these classes."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((2, 16)).astype(np.float32)
    classes = np.repeat(centres, 20, axis=0) + 0.5 * rng.standard_normal((40, 16)).astype(np.float32)
    weights = rng.standard_normal((40, _DIM)).astype(np.float32)
    embeddings = {"one": centres[0], "other": centres[1]}
    names = names_of_images(embeddings, classes, weights, np.zeros(_DIM, np.float32))
    own = np.repeat(np.arange(40), 5)
    images = np.square(np.maximum(weights[own] + 0.5 * rng.standard_normal((200, _DIM)), 0.0)).astype(
        np.float32
    )
    head = fit(Dataset(np.zeros((0, _DIM), np.float32), [], [], "classification", "f", names=names)).head
    answers = head.predict(images).probabilities.argmax(axis=1)
    assert np.mean((answers == 0) == (own < 20)) > 0.75

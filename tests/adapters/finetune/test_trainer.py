"""The two phases on small real networks: what stays frozen, what learns, what is kept, and how it goes on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adapters.finetune import data as samples
from adapters.finetune import full_phase
from adapters.finetune.checkpoint import load_checkpoint, save_checkpoint
from adapters.finetune.config import FineTuneConfig
from adapters.finetune.data import Images, Samples, Tensors, Texts, batches, samples_of, seeded
from adapters.finetune.export import TunedVersion, check_parity, finish
from adapters.finetune.full_phase import (
    Checkpoint,
    Diverged,
    FullNetworkPhase,
    HeldOutResult,
    Progress,
)
from adapters.finetune.model import (
    HeadLayer,
    Model,
    Score,
    TrainingSet,
    class_weights,
    embed,
    evaluate,
    freeze,
    unfreeze,
)
from adapters.finetune.trainer import fine_tune, train_head
from adapters.finetune.vocabulary import restricted_vocabulary
from adapters.heads.head import Head
from adapters.heads.scaling import Scaling
from adapters.probe.fit import ProbeConfig
from models.backbone import Backbone
from models.export.loaders import load_network
from models.export.network import Network
from models.export.onnx_export import write
from models.sources.source import ExportRefused
from models.spec import GRAPH_FILE, BackboneSpec, ImageTransform
from tests.support.models.gpu import require_gpu
from tests.support.models.random_models import make_models
from tests.support.models.shades import NAMES, picture

ROOT = Path(__file__).parents[3]
SIZE = 32
DIM = 16
CONFIG = FineTuneConfig(epochs=3, full_size_epochs=1, pixels=24, batch=16, head_rate=1e-2, backbone_rate=1e-3)
SPEC = BackboneSpec(
    name="timm:small",
    kind="image",
    source="timm:small",
    architecture="small",
    dim=DIM,
    transform=ImageTransform(SIZE, 0.875, "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    pooling="average",
    licence="Apache-2.0",
    precision="float32",
    weights_sha256="0" * 64,
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def network() -> Any:
    """Convolutions with batch normalisation, whose statistics are not those of the tests' pictures."""
    torch.manual_seed(3)
    body = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, stride=2),
        torch.nn.BatchNorm2d(8),
        torch.nn.ReLU(),
        torch.nn.Conv2d(8, DIM, 3, stride=2),
        torch.nn.BatchNorm2d(DIM),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
    )
    for module in body:
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0.0, 0.3)
            module.running_var.uniform_(0.5, 2.0)
    return body.eval()


def training_set(count: int = 90) -> TrainingSet:
    rng = np.random.default_rng(1)
    labels = np.arange(count) % 3
    transform = SPEC.transform
    assert isinstance(transform, ImageTransform)
    pictures = [picture(int(label), rng) for label in labels]
    return TrainingSet(Images(transform, pictures), labels, np.arange(count) % 4 == 3)


def head(transform: str = "sqrt") -> Head:
    """A head that knows nothing yet."""
    scaling = Scaling(transform, np.full(DIM, 0.25, np.float32), 0.5)  # type: ignore[arg-type]
    weight = np.random.default_rng(2).normal(0, 0.1, (3, DIM)).astype(np.float32)
    return Head("classification", "f", NAMES, scaling, weight, np.zeros(3, np.float32))


def state(module: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def loss_of(model: Model, embeddings: torch.Tensor, labels: torch.Tensor) -> float:
    with torch.inference_mode():
        return float(torch.nn.functional.cross_entropy(model.head(embeddings), labels).item())


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("transform", ["sqrt", "none"])
def test_the_layer_computes_what_the_head_computes(transform: str) -> None:
    embeddings = np.random.default_rng(5).uniform(0, 2, (7, DIM)).astype(np.float32)
    embeddings[0] = 0.0
    own = replace(head(transform), temperature=1.7)
    layer = HeadLayer(own)
    logits = layer(torch.from_numpy(embeddings))
    np.testing.assert_allclose(logits.detach().numpy(), own.logits(embeddings), atol=1e-5)
    inputs = torch.from_numpy(embeddings).requires_grad_()
    layer(inputs).sum().backward()
    assert torch.isfinite(inputs.grad).all()


def test_the_first_phase_leaves_the_network_as_it_is_bit_for_bit() -> None:
    model, learned = Model(network(), head(), SPEC.transform), training_set()
    before, head_before = state(model.network), state(model.head)
    embeddings = embed(model, learned.samples, learned.training)
    labels = torch.from_numpy(learned.labels[learned.training])
    loss_before = loss_of(model, embeddings, labels)
    train_head(model, embeddings, labels, 0.1)
    assert same(before, state(model.network))
    assert all(parameter.grad is None for parameter in model.network.parameters())
    assert not same(head_before, state(model.head))
    assert loss_of(model, embeddings, labels) < loss_before - 0.1


def test_the_first_phase_ends_at_a_minimum() -> None:
    model, learned = Model(network(), head(), SPEC.transform), training_set()
    embeddings = embed(model, learned.samples, learned.training)
    labels = torch.from_numpy(learned.labels[learned.training])
    start = model.head.weight.detach().clone()
    train_head(model, embeddings, labels, 5.0)
    model.head.zero_grad()
    loss = torch.nn.functional.cross_entropy(
        model.head(embeddings.clone()), labels, weight=class_weights(labels, 3)
    )
    (loss + 5.0 / (2 * len(labels)) * (model.head.weight - start).square().sum()).backward()
    assert float(model.head.weight.grad.abs().max()) < 1e-4


def test_the_second_phase_reaches_every_parameter_and_no_statistic() -> None:
    model, learned = Model(network(), head(), SPEC.transform), training_set()
    before = state(model)
    told: list[Progress] = []
    outcome = fine_tune(model, learned, 0.1, CONFIG, tell=lambda progress, _: told.append(progress))
    again = [(3, epoch) for epoch in range(1, outcome.measured.best_epoch + 1)]
    assert [(progress.phase, progress.epoch) for progress in told] == [(1, 0), (2, 1), (2, 2), (2, 3), *again]
    assert (told[1].epochs, told[-1].epochs) == (CONFIG.epochs, outcome.measured.best_epoch)
    shares = [progress.share for progress in told]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert outcome.measured.mix > 0.0
    after = state(model)
    for name, value in after.items():
        statistic = "running" in name or "num_batches" in name or name in ("head.mean", "head.scale")
        assert torch.equal(value, before[name]) == statistic, name


def test_the_second_phase_begins_without_gradients_of_the_first() -> None:
    model, learned = Model(network(), head(), SPEC.transform), training_set()
    embeddings = embed(model, learned.samples, range(len(learned.labels)))
    train_head(model, embeddings, torch.from_numpy(learned.labels), 0.1)
    assert model.head.weight.grad is not None
    FullNetworkPhase(model, learned, CONFIG, Score(1.0, 0.0))
    assert all(one.grad is None for one in model.parameters())


def test_the_rates_of_a_refit_fall_within_its_own_epochs() -> None:
    model, learned = Model(network(), head(), SPEC.transform), training_set()
    score = Score(1.0, 0.5)
    measured = HeldOutResult(score, score, 1.0, 3, 2)
    whole = FullNetworkPhase(model, learned, CONFIG, score)
    refit = FullNetworkPhase(model, learned, CONFIG, score, refit=(measured, whole.start))
    steps = -(-len(learned.training) // CONFIG.batch)
    assert whole._rate_at(2 * steps - 1) > 0.2
    assert refit._rate_at(2 * steps - 1) < 0.05
    assert max(refit._rate_at(step) for step in range(2 * steps)) > 0.9
    assert [progress.epochs for progress, _ in refit.epochs()] == [2, 2]


def test_steps_in_parts_are_those_of_one_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(full_phase, "_WEIGHTS_A_STEP", 500)
    model, other, learned = (
        Model(network(), head(), SPEC.transform),
        Model(network(), head(), SPEC.transform),
        training_set(),
    )
    assert same(state(model), state(other))
    phase = FullNetworkPhase(model, learned, CONFIG, Score(1.0, 0.0))
    assert len(phase._optimizers) == 3
    unfreeze(other.network)
    parts = [(other.head, CONFIG.head_rate), (other.network, CONFIG.backbone_rate)]
    reference = torch.optim.AdamW(
        [
            {"params": [one], "lr": 0.3 * rate, "weight_decay": 0.01 if one.ndim > 1 else 0.0}
            for part, rate in parts
            for one in part.parameters()
        ],
        fused=True,
    )
    for _ in range(3):
        for one in (model, other):
            inputs = learned.samples.plain(learned.training[:8])
            (10.0 * one(*inputs)).square().sum().backward()
        norm = torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        assert norm > 1.0
        reference.step()
        reference.zero_grad()
        phase._step(0.3)
        assert same(state(model), state(other))
        assert all(one.grad is None for one in model.parameters())


def test_a_batch_in_pieces_gives_the_gradients_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rare labels weigh more, so the pieces of a batch do not all weigh the same."""
    whole = training_set()
    some = replace(whole, held_out=(whole.labels == 2) & (np.arange(90) > 12))
    found = []
    for at_once in (1_000, 5):
        monkeypatch.setattr(samples, "_PIXELS_AT_ONCE", at_once * SIZE * SIZE)
        model = Model(network(), head(), SPEC.transform)
        phase = FullNetworkPhase(model, some, CONFIG, Score(1.0, 0.5), None)
        seeded(7)
        loss = phase._accumulate(some.training[:23], 0)
        found.append((loss, [one.grad for one in model.parameters()]))
    (loss, gradients), (loss_in_pieces, in_pieces) = found
    assert loss_in_pieces == pytest.approx(loss, rel=1e-5)
    for one, other in zip(gradients, in_pieces, strict=True):
        assert one is not None
        assert one.abs().max() > 0.0
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)


def test_unfreezing_keeps_normalisation_in_inference_mode() -> None:
    body = network()
    unfreeze(body)
    modes = {type(module).__name__: module.training for module in body}
    assert modes["Conv2d"]
    assert not modes["BatchNorm2d"]
    assert all(parameter.requires_grad for parameter in body.parameters())
    freeze(body)
    assert not any(parameter.requires_grad for parameter in body.parameters())
    assert not any(module.training for module in body.modules())


def test_fine_tuning_learns_what_a_head_cannot() -> None:
    model = Model(network(), head(), SPEC.transform)
    config = replace(CONFIG, epochs=8)
    outcome = fine_tune(model, training_set(150), 0.1, config)
    assert outcome.measured.final.loss < outcome.measured.first.loss
    assert outcome.measured.final.accuracy >= outcome.measured.first.accuracy


def test_the_first_phase_is_kept_where_the_second_is_no_better() -> None:
    model = Model(network(), head(), SPEC.transform)
    phase_one: list[dict[str, torch.Tensor]] = []

    def tell(progress: Progress, checkpoint: Checkpoint | None) -> None:
        if progress.phase == 1:
            phase_one.append(state(model))

    outcome = fine_tune(
        model, training_set(), 0.1, replace(CONFIG, backbone_rate=5.0, head_rate=5.0), tell=tell
    )
    assert outcome.measured.mix == 0.0
    assert outcome.measured.final == outcome.measured.first
    assert same(phase_one[0], state(model))


def test_it_does_not_stop_while_its_rate_is_high() -> None:
    """Rates that undo everything: nothing is ever better, and it stops in the second half."""
    config = replace(CONFIG, epochs=8, full_size_epochs=8, patience=2, head_rate=1.0, backbone_rate=0.1)
    told: list[Progress] = []
    outcome = fine_tune(
        Model(network(), head(), SPEC.transform),
        training_set(),
        0.1,
        config,
        tell=lambda progress, _: told.append(progress),
    )
    losses = [progress.held_out.loss for progress in told if progress.held_out is not None]
    assert min(losses) == losses[0]
    assert outcome.measured.epochs == 6


class Recorded:
    """Samples that note which rows were asked for, augmented, in each phase."""

    def __init__(self, samples: Samples) -> None:
        self._samples = samples
        self.size = samples.size
        self.vocabulary = samples.vocabulary
        self.phase = 2
        self.trained: dict[int, list[int]] = {2: [], 3: []}

    def plain(self, rows: Sequence[int]) -> Tensors:
        return self._samples.plain(rows)

    def augmented(self, rows: Sequence[int], size: int) -> Tensors:
        self.trained[self.phase] += rows
        return self._samples.augmented(rows, size)

    def pieces(self, rows: Sequence[int], size: int) -> list[list[int]]:
        return self._samples.pieces(rows, size)


def test_rows_held_out_are_trained_on_once_all_is_measured_and_not_before() -> None:
    model, learned = Model(network(), head(), SPEC.transform), training_set()
    samples = Recorded(learned.samples)

    def tell(progress: Progress, checkpoint: Checkpoint | None) -> None:
        if progress.phase == 2 and progress.epoch == CONFIG.epochs:
            samples.phase = 3
        assert progress.phase < 3 or progress.held_out is None

    outcome = fine_tune(model, replace(learned, samples=samples), 0.1, CONFIG, tell=tell)
    assert outcome.refit_epochs == outcome.measured.best_epoch > 0
    assert sorted(samples.trained[2]) == sorted(learned.training * CONFIG.epochs)
    assert sorted(samples.trained[3]) == sorted([*range(len(learned.labels))] * outcome.refit_epochs)
    assert outcome.logits is not None
    logits = torch.from_numpy(outcome.logits)
    labels = torch.from_numpy(learned.labels[learned.testing])
    measured = outcome.measured.final
    assert float((logits.argmax(dim=1) == labels).float().mean()) == pytest.approx(measured.accuracy)
    # By now it fits them better than the measured model did.
    assert evaluate(model, learned).loss < measured.loss


class Stop(Exception):
    """Ends a fine-tune."""


def checkpoint_of(phase: int) -> Checkpoint:
    """The checkpoint after the first epoch of a phase."""
    kept: list[Checkpoint] = []

    def stop(progress: Progress, checkpoint: Checkpoint | None) -> None:
        if checkpoint is not None and progress.phase == phase:
            kept.append(checkpoint)
            raise Stop

    with pytest.raises(Stop):
        fine_tune(Model(network(), head(), SPEC.transform), training_set(), 0.1, CONFIG, tell=stop)
    return kept[0]


@pytest.mark.parametrize("phase", [2, 3])
def test_it_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, phase: int
) -> None:
    # Several optimizers, as a larger network has.
    monkeypatch.setattr(full_phase, "_WEIGHTS_A_STEP", 500)
    whole = Model(network(), head(), SPEC.transform)
    expected = fine_tune(whole, training_set(), 0.1, CONFIG)
    assert expected.refit_epochs > 1
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, checkpoint_of(phase), "this work")
    assert load_checkpoint(path, "other work") is None
    resumed = Model(network(), head(), SPEC.transform)
    found = fine_tune(resumed, training_set(), 0.1, CONFIG, resume=load_checkpoint(path, "this work"))
    assert (found.measured, found.refit_epochs) == (expected.measured, expected.refit_epochs)
    assert same(state(whole), state(resumed))
    np.testing.assert_array_equal(found.logits, expected.logits)


def test_without_a_refit_the_network_is_the_one_that_was_measured() -> None:
    model, learned = Model(network(), head(), SPEC.transform), training_set()
    outcome = fine_tune(model, learned, 0.1, replace(CONFIG, refit=False))
    assert (outcome.refit_epochs, outcome.logits) == (0, None)
    assert evaluate(model, learned) == outcome.measured.final


def test_a_loss_that_is_no_number_ends_it() -> None:
    model = Model(network(), head(), SPEC.transform)
    with torch.no_grad():
        model.head.bias[0] = float("nan")
    with pytest.raises(Diverged):
        fine_tune(model, training_set(), 0.1, CONFIG)


def test_rare_labels_count_more_and_all_together_the_same() -> None:
    labels = torch.tensor([0] * 90 + [1] * 10)
    weights = class_weights(labels, 2)
    assert weights[1] / weights[0] == pytest.approx(3.0)
    assert float(weights[labels].mean()) == pytest.approx(1.0)


def test_hidden_words_are_never_the_first_or_the_last() -> None:
    texts = Texts([np.arange(10, 10 + length) for length in (30, 5)], pad_id=0, mask_id=99)
    seeded(1)
    hidden = [texts.augmented([0, 1], 0) for _ in range(50)]
    ids = torch.stack([one for one, _ in hidden])
    assert (ids[:, 0, 0] == 10).all()
    assert (ids[:, 0, 29] == 39).all()
    assert (ids[:, 1, 4] == 14).all()
    assert (ids[:, 1, 5:] == 0).all()
    assert 0.05 < float((ids[:, 0, 1:29] == 99).float().mean()) < 0.15
    plain, mask = texts.plain([0, 1])
    assert plain[1].tolist() == [10, 11, 12, 13, 14] + [0] * 25
    assert mask.sum(dim=1).tolist() == [30, 5]


def test_the_token_that_hides_words_is_the_tokenizers_own(folders: Path, tmp_path: Path) -> None:
    whole = load_network(f"sentence-transformers:{folders / 'mean'}")
    (tmp_path / "tokenizer.json").write_bytes(whole.tokenizer or b"")
    texts = samples_of(whole.spec, ["a b c d e f g h i j"] * 20, tmp_path / "tokenizer.json")
    seeded(3)
    changed, plain = texts.augmented(range(20), 0)[0], texts.plain(range(20))[0]
    assert (changed[changed != plain] == 4).all()
    assert (changed != plain).any()


def test_texts_train_beside_others_of_their_length() -> None:
    texts = Texts([np.zeros(length, np.int64) for length in (40, 3, 200, 5, 45, 4)], pad_id=0, mask_id=None)
    assert texts.pieces(range(6), 0) == [[1, 5, 3], [0, 4], [2]]
    assert texts.pieces([4, 0, 1], 0) == [[1, 0], [4]]


def test_what_is_hidden_does_not_depend_on_what_trains_together() -> None:
    texts = Texts([np.arange(10, 10 + length) for length in (30, 40, 5)], pad_id=0, mask_id=99)
    seeded(2)
    together = texts.augmented([2, 0, 1], 0)[0]
    seeded(2)
    alone = [texts.augmented([row], 0)[0][0] for row in (2, 0, 1)]
    assert (together == 99).any()
    for row, own in zip(together, alone, strict=True):
        assert row[: len(own)].tolist() == own.tolist()
    assert texts.plain([0, 1, 2])[0].max() == 49


def test_more_threads_train_more_together(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = Texts([np.zeros(40, np.int64)] * 4, pad_id=0, mask_id=None)
    assert isinstance(SPEC.transform, ImageTransform)
    images = Images(SPEC.transform, [b""] * 4)
    assert [len(texts.pieces(range(4), 0)), len(images.pieces(range(4), 224))] == [2, 2]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert [len(texts.pieces(range(4), 0)), len(images.pieces(range(4), 224))] == [1, 1]


def test_batches_cover_every_row_once() -> None:
    rows = [5, 7, 9, 11, 13]
    assert list(batches(rows, 2)) == [[5, 7], [9, 11], [13]]
    shuffled = [row for some in batches(rows, 2, seeded(4)) for row in some]
    assert sorted(shuffled) == rows
    assert shuffled == [row for some in batches(rows, 2, seeded(4)) for row in some]


@pytest.fixture(scope="module")
def tuned() -> tuple[Model, TrainingSet, TunedVersion]:
    torch.manual_seed(0)
    model, learned = Model(network(), head(), SPEC.transform), training_set()
    outcome = fine_tune(model, learned, 0.1, CONFIG)
    return model, learned, finish(small(model), model, learned, NAMES, outcome, ProbeConfig())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Networks as timm and sentence-transformers save them."""
    folder = tmp_path_factory.mktemp("networks")
    make_models(folder, "image", "mean")
    return folder


@pytest.mark.parametrize("name", ["timm:image", "sentence-transformers:mean"])
def test_networks_of_both_libraries_are_tuned_and_exported(folders: Path, tmp_path: Path, name: str) -> None:
    library, _, folder = name.partition(":")
    whole = load_network(f"{library}:{folders / folder}")
    rng = np.random.default_rng(7)
    labels = np.arange(60) % 3
    inputs = [
        picture(int(label), rng) if library == "timm" else f"{'abc'[label]} {rng.integers(100)}"
        for label in labels
    ]
    tokenizer = None
    if whole.tokenizer is not None:
        tokenizer = tmp_path / "tokenizer.json"
        tokenizer.write_bytes(whole.tokenizer)
    samples = samples_of(whole.spec, inputs, tokenizer)
    dim = whole.spec.dim
    blank = Head(
        "classification",
        "f",
        NAMES,
        Scaling("none", np.zeros(dim, np.float32), 1.0),
        np.zeros((3, dim), np.float32),
        np.zeros(3, np.float32),
    )
    model = Model(whole.forward, blank, whole.spec.transform)
    learned = TrainingSet(samples, labels, np.arange(60) % 4 == 3)
    table, vocabulary = whole.words, samples.vocabulary
    assert (table is None) == (vocabulary is None) == (library == "timm")
    before = None if table is None else table.weight.detach().clone()
    with restricted_vocabulary(table, vocabulary):
        if vocabulary is not None:
            assert len(table.weight) == len(vocabulary)
        outcome = fine_tune(model, learned, 0.1, replace(CONFIG, epochs=2, pixels=32))
    if vocabulary is not None:
        assert before is not None
        assert len(vocabulary) < len(before)
        moved = torch.nonzero((table.weight != before).any(dim=1)).flatten().tolist()
        assert bool(moved) == (outcome.measured.mix > 0.0)
        assert set(moved) <= set(vocabulary.tolist())
    made = finish(whole, model, learned, NAMES, outcome, ProbeConfig())
    assert made.report["export"]["largest_difference"] <= 1e-3
    assert made.spec.fingerprint != whole.spec.fingerprint


def small(model: Model) -> Network:
    return Network(SPEC, model.network, lambda images: np.zeros((0, DIM), np.float32))


def test_the_export_answers_as_torch_does(
    tuned: tuple[Model, TrainingSet, TunedVersion], tmp_path: Path
) -> None:
    model, learned, made = tuned
    assert made.report["export"]["probes"] == 512
    assert made.report["export"]["largest_difference"] <= 1e-3
    assert made.spec.fingerprint == made.head.fingerprint != SPEC.fingerprint
    # The graph that was published, and nothing beside it but what the backbone has anyway.
    write(Network(made.spec, model.network, lambda images: np.zeros((0, DIM), np.float32)), tmp_path)
    assert (tmp_path / GRAPH_FILE).stat().st_size == len(made.onnx)
    with torch.inference_mode():
        plain = learned.samples.plain(learned.testing)
        expected = made.head.logits(model.embed(*plain).numpy())
    ours = made.head.logits(Backbone.open(tmp_path).run(list(plain[0].numpy())))
    np.testing.assert_allclose(ours, expected, atol=1e-3)


def test_the_report_is_of_the_rows_held_out(tuned: tuple[Model, TrainingSet, TunedVersion]) -> None:
    _, learned, made = tuned
    assert np.isnan(made.scores[learned.training]).all()
    assert made.report["accuracy"] == pytest.approx(float(made.scores[learned.testing].mean()))
    assert made.report["method"] == "22 examples held out"
    assert made.report["fine_tune"]["tuned"]["accuracy"] == pytest.approx(made.report["accuracy"])
    assert made.head.region is not None


def test_a_fine_tuned_version_answers_what_is_worst_to_miss(
    tuned: tuple[Model, TrainingSet, TunedVersion],
) -> None:
    torch.manual_seed(0)
    model, learned = Model(network(), head(), SPEC.transform), training_set()
    outcome = fine_tune(model, learned, 0.1, CONFIG)
    config = ProbeConfig(costs={NAMES[1]: 1e6})
    made = finish(small(model), model, learned, NAMES, outcome, config)
    _, _, plain = tuned
    assert made.head.costs.tolist() == [1.0, 1e6, 1.0]
    np.testing.assert_allclose(made.head.weight, plain.head.weight, rtol=1e-3, atol=1e-3)
    own = learned.labels[learned.testing]
    # What promotion judges is what was learned, whatever the costs.
    np.testing.assert_array_equal(made.scores, plain.scores)
    assert made.report["per_label"][NAMES[1]]["recall"] == 1.0
    assert made.report["accuracy"] == pytest.approx((own == 1).mean())


def test_an_export_of_other_weights_is_refused(
    tuned: tuple[Model, TrainingSet, TunedVersion], tmp_path: Path
) -> None:
    model, learned, made = tuned
    other = network()
    write(Network(SPEC, other, lambda images: np.zeros((0, DIM), np.float32)), tmp_path)
    with pytest.raises(ExportRefused, match="Nothing was published"):
        check_parity(model, made.head, Backbone.open(tmp_path), learned)


@pytest.mark.gpu
def test_a_gpu_trains_what_a_cpu_then_serves() -> None:
    require_gpu()
    model, learned = Model(network(), head(), SPEC.transform).to("cuda"), training_set()
    config = replace(CONFIG, epochs=8)
    outcome = fine_tune(model, learned, 0.1, config)
    made = finish(small(model), model, learned, NAMES, outcome, ProbeConfig(answer_accuracy=0.9))
    assert made.report["export"]["largest_difference"] <= 1e-3
    assert made.report["accuracy"] > 0.5


@pytest.mark.parametrize("transform", ["sqrt", "none"])
def test_the_head_computes_in_single_precision_whatever_the_network_does(transform: str) -> None:
    """As Head.predict does: bfloat16 has 8 bits of mantissa."""
    embeddings = torch.from_numpy(np.random.default_rng(5).uniform(0, 2, (7, DIM)).astype(np.float32))
    layer = HeadLayer(head(transform))
    with torch.autocast("cpu", torch.bfloat16):
        logits = layer(embeddings)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, layer(embeddings), rtol=0, atol=0)


def test_pictures_are_trained_on_as_they_are_served(tmp_path: Path) -> None:
    """Plain or augmented they are bytes, and the model makes the same pixels of them as its export does."""
    model, learned = Model(network(), head(), SPEC.transform), training_set()
    (plain,), (augmented,) = learned.samples.plain([0, 1, 2]), learned.samples.augmented([0, 1, 2], 24)
    assert plain.dtype == augmented.dtype == torch.uint8
    assert plain.shape == (3, SIZE, SIZE, 3)
    assert augmented.shape == (3, 24, 24, 3)
    write(small(model), tmp_path)
    with torch.inference_mode():
        theirs = model.embed(plain).numpy()
    np.testing.assert_allclose(Backbone.open(tmp_path).run(list(plain.numpy())), theirs, atol=1e-5)
    assert "_scale" not in "".join(model.state_dict())

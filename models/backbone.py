"""A backbone that runs: preprocessing and an ONNX Runtime session, inputs → embeddings."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from models import probes
from models.arrays import Floats
from models.manifest import CorruptExport, read_manifest, read_tables, takes_bytes
from models.preprocess.decoder import Waiting, wait_unseen
from models.preprocess.expense import HEAVY, image_expense, text_expense
from models.preprocess.pixels import with_byte_input
from models.preprocess.preprocessor import (
    TINY_IMAGE,
    ImagePreprocessor,
    InputError,
    InputLimits,
    Prepared,
    Silence,
    TextPreprocessor,
)
from models.runtime import driver
from models.runtime.autotune import (
    BATCHES,
    BATCHES_ON_GPU,
    ExecutionPlan,
    Measured,
    Run,
    is_quiet,
    keep_plan,
    measure,
    measure_on_gpu,
    read_plan,
    ways_on_gpu,
)
from models.runtime.cuda import CudaRunner, shapes_for
from models.runtime.progress import ThreadProgress
from models.runtime.session import GPU_ADVICE, Device, DeviceUnavailable, open_session, open_table
from models.runtime.trial import try_out
from models.spec import (
    FLOAT16,
    GRAPH_FILE,
    HALF_FILE,
    IDS,
    INT8,
    MASK,
    OUTPUT_NAME,
    RGB,
    TOKENIZER_FILE,
    BackboneSpec,
    ImageTransform,
    TextTransform,
)

# Tokens of one run on a CPU, padding included: what bounds its memory.
_TOKENS_PER_RUN = 1024
# Of a short text.
_TOKENS = 16
# Inputs of one run of a fine-tuned network on a GPU, at most.
_TUNED_BATCH = 32


@dataclass(frozen=True, slots=True)
class Embedded:
    """What became of n inputs.

    embeddings: float32 (n, dim), in the order of the inputs; the row of an input that failed is zero. errors:
    by position. timings: seconds by stage: "decode" or "tokenize" and "embed" are worker time spent on these
    inputs, "queue" is the wait until the first of them was taken up. callers: how many get their answer
    together. unknown: positions of texts without a token that the backbone knows; their embeddings say
    nothing. truncated: positions of texts longer than the backbone reads, of which only the start counts.
    tokens: that it read, of all texts.
    """

    embeddings: Floats
    errors: dict[int, InputError] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    callers: int = 1
    unknown: frozenset[int] = frozenset()
    truncated: frozenset[int] = frozenset()
    tokens: int = 0


class Ready(NamedTuple):
    """One input as the network takes it. unknown, truncated, tokens: see Embedded."""

    prepared: Prepared
    unknown: bool = False
    truncated: bool = False
    tokens: int = 0


class Backbone:
    """One exported backbone, loaded. Thread-safe: calls from several threads run beside each other.

    fingerprint: of the spec, which would compute it anew each time. pace: seconds for an element of a
    prepared input in the first run, which is slow.
    """

    def __init__(
        self,
        spec: BackboneSpec,
        path: Path,
        session: Any,
        beside: Any,
        preprocessor: ImagePreprocessor | TextPreprocessor,
        device: Device,
        plan: ExecutionPlan,
    ) -> None:
        self.spec = spec
        self.fingerprint = spec.fingerprint
        self.path = path
        self.device: Device = device
        self._session = session
        self._beside = beside
        self._preprocessor = preprocessor
        self.plan = plan
        self.pace = 0.0

    @classmethod
    def open(
        cls,
        export: Path,
        *,
        device: Device = "cpu",
        threads: int = 1,
        plan: ExecutionPlan | None = None,
        limits: InputLimits = InputLimits(),
    ) -> Backbone:
        """Loads the export folder, and runs it once: the first run of a session is slow.

        threads: in all, on a CPU. plan: how to use them; the usual one by default. Raises CorruptExport,
        DeviceUnavailable.
        """
        spec = _spec_for(export, device, verify=True)
        preprocessor = (
            ImagePreprocessor(spec.transform, limits)
            if isinstance(spec.transform, ImageTransform)
            else TextPreprocessor(spec.transform, export / TOKENIZER_FILE, limits)
        )
        plan = plan or ExecutionPlan.usual(spec.kind, device, threads)
        # Both sessions look up in one table. A GPU has a copy of its own.
        tables = {name: open_table(path) for name, path in read_tables(export).items() if device == "cpu"}
        images = spec.kind == "image"
        session: Any
        if device == "cuda":
            session = _runner(spec, _graph(export, spec, plan.half), plan, preprocessor)
        else:
            session = open_session(
                _graph(export, spec), device=device, threads=plan.alone, one_shape=images, tables=tables
            )
        # Runs beside each other share the cores best when each keeps to few: threads of one run wait for its
        # slowest.
        beside = session
        if device == "cpu" and plan.beside != plan.alone:
            beside = open_session(
                _graph(export, spec), device=device, threads=plan.beside, one_shape=images, tables=tables
            )
        backbone = cls(spec, export, session, beside, preprocessor, device, plan)
        if not backbone._answers():
            raise CorruptExport(
                f"{export} does not give {spec.dim} finite numbers; export the backbone again."
            )
        return backbone

    def with_network(self, graph: bytes) -> Backbone:
        """The same preprocessing in front of another network of the same form: a fine-tuned one.

        graph: ONNX with the inputs and the output of this one. Raises CorruptExport, InvalidGraph.
        """
        if isinstance(self.spec.transform, ImageTransform):
            graph = with_byte_input(graph, self.spec.transform)
        plan = self.plan
        session: Any
        if self.device == "cuda":
            # Many shapes and their graphs, of each tenant's network, would fill the GPU.
            plan = replace(plan, batch=min(_TUNED_BATCH, plan.batch), half=False, graphs=False)
            session = _runner(self.spec, graph, plan, self._preprocessor, few=True)
        else:
            session = open_session(
                graph, device="cpu", threads=plan.alone, one_shape=self.spec.kind == "image"
            )
        tuned = Backbone(self.spec, self.path, session, session, self._preprocessor, self.device, plan)
        if not tuned._answers():
            tuned.close()
            raise CorruptExport("The fine-tuned network does not give finite embeddings; fine-tune again.")
        return tuned

    @property
    def precision(self) -> str:
        """Of the weights and the arithmetic, e.g. float32."""
        return FLOAT16 if self.plan.half else self.spec.precision

    @property
    def batch(self) -> int:
        """Inputs that are best run together, at most."""
        return self.plan.batch

    @property
    def nbytes(self) -> int:
        """Of memory beside its graph that it keeps for its runs."""
        return self._session.nbytes if isinstance(self._session, CudaRunner) else 0

    @property
    def lost(self) -> bool:
        """Whether its device has failed, so that only another process can use it."""
        return isinstance(self._session, CudaRunner) and self._session.lost

    @property
    def runner(self) -> ThreadProgress | None:
        """What the thread is at that runs whatever is submitted; None where callers run it themselves."""
        return self._session.turn if isinstance(self._session, CudaRunner) else None

    @property
    def seconds_by_stage(self) -> Mapping[str, float]:
        """What the thread that runs on a GPU has spent, see models.runtime.cuda.STAGES; nothing on a CPU."""
        return self._session.seconds if isinstance(self._session, CudaRunner) else {}

    @property
    def budget(self) -> float:
        """What the inputs of one run may cost together: on a CPU long ones gain nothing from company."""
        return max(2 * HEAVY, 1.5 * self.batch) if self.device == "cpu" else math.inf

    @property
    def heavy_batch(self) -> int:
        """Inputs above HEAVY that are run together, at most."""
        return 1 if self.device == "cpu" else self.batch

    @property
    def bulk_batch(self) -> int:
        """Inputs of one run of bulk, at most: of images one, for more would stay in memory."""
        return 1 if self.device == "cpu" and self.spec.kind == "image" else self.batch

    @property
    def canary(self) -> bytes | str:
        """The least input that it takes, to see whether it answers, and always the same."""
        return TINY_IMAGE if self.spec.kind == "image" else "a"

    @property
    def preprocess_stage(self) -> str:
        """What preprocessing is called in timings and metrics: decode or tokenize."""
        return "decode" if self.spec.kind == "image" else "tokenize"

    def expense(self, item: bytes | str) -> float:
        """What an input will cost, in units of a small one's, without looking at all of it; see HEAVY."""
        if isinstance(item, bytes):
            return image_expense(item)
        tokens = self.spec.transform.max_tokens if isinstance(self.spec.transform, TextTransform) else 0
        return text_expense(item, tokens)

    def preprocess(self, item: bytes | str) -> Prepared:
        """One input as the network takes it. Raises InputError, also for an input of the other kind."""
        return self.prepare(item).prepared

    def prepare(self, item: bytes | str, waiting: Waiting = wait_unseen) -> Ready:
        """One input with what its answer says of it. Raises as preprocess does.

        waiting(True) is called where another process begins to prepare it, waiting(False) once it is done.
        """
        preprocessor = self._preprocessor
        if isinstance(item, bytes) and isinstance(preprocessor, ImagePreprocessor):
            return Ready(preprocessor(item, waiting))
        if isinstance(item, str) and isinstance(preprocessor, TextPreprocessor):
            prepared, truncated = preprocessor.cut(item)
            return Ready(prepared, self.knows_nothing(item, prepared), truncated, len(prepared))
        raise InputError("wrong_kind", f"The backbone {self.spec.name} takes {self.spec.kind} inputs.")

    def knows_nothing(self, item: bytes | str, prepared: Prepared) -> bool:
        """Whether a prepared text has no token that the backbone knows; False for images."""
        if isinstance(item, str) and isinstance(self._preprocessor, TextPreprocessor):
            return self._preprocessor.knows_nothing(item, prepared)
        return False

    @property
    def silence(self) -> Silence | None:
        """How to see that a text's tokens say nothing; None for images."""
        return self._preprocessor.silence if isinstance(self._preprocessor, TextPreprocessor) else None

    def unknown(self, inputs: Sequence[bytes | str]) -> frozenset[int]:
        """Positions of texts without a token that the backbone knows, without embedding them.

        An input that cannot be prepared is not among them.
        """
        text = self._preprocessor
        return _positions(inputs, text.is_unknown) if isinstance(text, TextPreprocessor) else frozenset()

    def truncated(self, inputs: Sequence[bytes | str]) -> frozenset[int]:
        """Positions of texts of which the backbone reads only the start, without embedding them.

        An input that cannot be prepared is not among them.
        """
        text = self._preprocessor
        return _positions(inputs, text.is_truncated) if isinstance(text, TextPreprocessor) else frozenset()

    def run(self, prepared: Sequence[Prepared], *, beside: bool = False) -> Floats:
        """Embeddings, float32 (n, dim), of n prepared inputs, in bounded memory whatever n is.

        beside: other runs are under way on every core, so this one should keep to its own thread. A row does
        not depend on the others: within 1e-5 on a CPU it is what it would be alone.
        """
        session = self._beside if beside else self._session
        if session is None:
            raise RuntimeError(f"the backbone {self.spec.name} is closed")
        if isinstance(session, CudaRunner):
            return session.run(prepared)
        session.crew.make_room()
        embeddings = np.zeros((len(prepared), self.spec.dim), np.float32)
        for rows in self._chunks(prepared):
            embeddings[rows] = session.run([OUTPUT_NAME], self.feed([prepared[row] for row in rows]))[0]
        return embeddings

    def submit(self, prepared: Sequence[Prepared]) -> Future[Floats]:
        """What run gives, later: for a backbone with a runner. See CudaRunner.submit."""
        session = self._session
        if session is None:
            raise RuntimeError(f"the backbone {self.spec.name} is closed")
        return session.submit(prepared)  # type: ignore[no-any-return]

    def probes(self) -> list[Prepared]:
        """Prepared inputs of many kinds, on which two ways to run it can be compared."""
        return _probes(self._preprocessor)

    def embed(self, inputs: Sequence[bytes | str]) -> Embedded:
        """preprocess and run, in this thread. For a service, put a Batcher in front."""
        embeddings = np.zeros((len(inputs), self.spec.dim), np.float32)
        errors: dict[int, InputError] = {}
        unknown: set[int] = set()
        truncated: set[int] = set()
        tokens = 0
        timings = {self.preprocess_stage: 0.0, "queue": 0.0, "embed": 0.0}
        for start in range(0, len(inputs), self.batch):
            begin = time.perf_counter()
            prepared: dict[int, Prepared] = {}
            for index in range(start, min(start + self.batch, len(inputs))):
                try:
                    ready = self.prepare(inputs[index])
                except InputError as error:
                    # A raised error keeps its frames, and this frame keeps the error. A new one has none.
                    errors[index] = InputError(error.code, error.detail)
                    continue
                prepared[index] = ready.prepared
                tokens += ready.tokens
                if ready.unknown:
                    unknown.add(index)
                if ready.truncated:
                    truncated.add(index)
            middle = time.perf_counter()
            embeddings[list(prepared)] = self.run(list(prepared.values()))
            timings[self.preprocess_stage] += middle - begin
            timings["embed"] += time.perf_counter() - middle
        found = frozenset(unknown), frozenset(truncated)
        return Embedded(embeddings, errors, timings, 1, *found, tokens)

    def close(self) -> None:
        """Frees the network's memory as soon as no run is under way. Runs after it raise RuntimeError."""
        if isinstance(self._session, CudaRunner):
            self._session.close()
        self._session = self._beside = None

    def _answers(self) -> bool:
        begin, blank = time.perf_counter(), _blank(self.spec)
        embedding = self.run([blank])
        self.pace = (time.perf_counter() - begin) / blank.size
        return embedding.shape == (1, self.spec.dim) and bool(np.isfinite(embedding).all())

    def feed(self, prepared: Sequence[Prepared]) -> dict[str, NDArray[Any]]:
        """One run's inputs as the graph takes them, texts padded to the longest. At least one."""
        return _feed(self.spec, prepared)

    def _chunks(self, prepared: Sequence[Prepared]) -> Iterator[list[int]]:
        """The rows that go into one run each."""
        if self.spec.kind == "image":
            for start in range(0, len(prepared), self.batch):
                yield list(range(start, min(start + self.batch, len(prepared))))
            return
        # Longest first: a chunk is as wide as its first text, and neighbours in length waste little on
        # padding.
        order = sorted(range(len(prepared)), key=lambda row: -len(prepared[row]))
        while order:
            width = len(prepared[order[0]])
            fit = max(1, min(self.batch, _TOKENS_PER_RUN // width))
            rows, order = order[:fit], order[fit:]
            yield rows


def _positions(inputs: Sequence[bytes | str], holds: Callable[[str], bool]) -> frozenset[int]:
    """Positions of the texts for which it holds; a text that cannot be prepared is left out."""
    found: set[int] = set()
    for index, item in enumerate(inputs):
        with suppress(InputError):
            if isinstance(item, str) and holds(item):
                found.add(index)
    return frozenset(found)


def planned(export: Path, *, device: Device, threads: int) -> Measured:
    """How the export runs best here, with this number of threads in all.

    Measured now if it never was, and again where that is in doubt and the machine is quiet. Raises
    CorruptExport, DeviceUnavailable.
    """
    found = known_plan(export, device=device, threads=threads)
    if found is None or (not found.confirmed and is_quiet()):
        return survey(export, device=device, threads=threads)
    return found


def known_plan(export: Path, *, device: Device, threads: int) -> Measured | None:
    """What was measured here before, None if nothing was. Raises as planned does."""
    spec = _spec_for(export, device, verify=False)
    return read_plan(export, ExecutionPlan.usual(spec.kind, device, threads), device)


def survey(export: Path, *, device: Device, threads: int) -> Measured:
    """Measures now; what is doubted less, this or what was known, is given and kept.

    Of two that are confirmed, this. Raises as planned does.
    """
    spec = _spec_for(export, device, verify=False)
    usual = ExecutionPlan.usual(spec.kind, device, threads)
    before = read_plan(export, usual, device)
    found = (_measure if device == "cpu" else _measure_on_gpu)(export, spec, usual)
    if before is not None and not found.confirmed and before.doubt < found.doubt:
        return before
    keep_plan(export, usual, device, found)
    return found


def _measure(export: Path, spec: BackboneSpec, usual: ExecutionPlan) -> Measured:
    def open_run(count: int) -> Run:
        session = open_session(
            _graph(export, spec), device="cpu", threads=count, one_shape=spec.kind == "image"
        )
        return lambda feed: session.run([OUTPUT_NAME], feed)

    blank = _blank(spec)
    return measure(usual, BATCHES[spec.kind], open_run, lambda count: _feed(spec, [blank] * count))


def _measure_on_gpu(export: Path, spec: BackboneSpec, usual: ExecutionPlan) -> Measured:
    if driver.gpu_name() is None:
        raise DeviceUnavailable(GPU_ADVICE)
    ways = ways_on_gpu(usual, (export / HALF_FILE).exists(), spec.kind == "image")
    batches = BATCHES_ON_GPU[spec.kind]
    # Every batch that is tried is one run.
    ways = tuple(replace(way, batch=max(batches)) for way in ways)
    return measure_on_gpu(usual, ways, batches, lambda way: try_out(export, way, (1, *batches)))


def _runner(
    spec: BackboneSpec,
    graph: Path | bytes,
    plan: ExecutionPlan,
    preprocessor: ImagePreprocessor | TextPreprocessor,
    *,
    few: bool = False,
) -> CudaRunner:
    return CudaRunner(
        spec,
        partial(
            open_session,
            graph,
            device="cuda",
            graphs=plan.graphs,
            half=plan.half,
            channels_last=plan.channels_last,
        ),
        shapes_for(spec, plan.batch, few=few),
        _probes(preprocessor),
        graphs=plan.graphs,
        is_lost=driver.is_lost,
    )


def _probes(preprocessor: ImagePreprocessor | TextPreprocessor) -> list[Prepared]:
    if isinstance(preprocessor, ImagePreprocessor):
        # Whatever a setting allows.
        prepare = ImagePreprocessor(preprocessor.transform)
        return [prepare(picture) for picture in probes.pictures()]
    return [preprocessor.tokens(text)[0] for text in probes.TEXTS]


def _graph(export: Path, spec: BackboneSpec, half: bool = False) -> Path | bytes:
    """A graph of the export that takes pictures as bytes, whichever release exported it."""
    name = HALF_FILE if half else GRAPH_FILE
    if not isinstance(spec.transform, ImageTransform) or takes_bytes(export):
        return export / name
    return with_byte_input((export / name).read_bytes(), spec.transform)


def _spec_for(export: Path, device: Device, *, verify: bool) -> BackboneSpec:
    spec = read_manifest(export, verify=verify)
    if spec.precision == INT8 and device != "cpu":
        # ONNX Runtime would run its products on the CPU, and say nothing.
        raise DeviceUnavailable(
            f"{spec.name} is for CPUs; on a GPU serve {spec.name.removesuffix('-int8')}, faster there."
        )
    return spec


def _feed(spec: BackboneSpec, prepared: Sequence[Prepared]) -> dict[str, NDArray[Any]]:
    if isinstance(spec.transform, ImageTransform):
        return {RGB: prepared[0][None] if len(prepared) == 1 else np.stack(prepared)}
    width = max(len(tokens) for tokens in prepared)
    ids = np.full((len(prepared), width), spec.transform.pad_id, np.int64)
    mask = np.zeros((len(prepared), width), np.int64)
    for row, tokens in enumerate(prepared):
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
    return {IDS: ids, MASK: mask}


def _blank(spec: BackboneSpec) -> Prepared:
    """An input that is like any other for those who only want it run."""
    if isinstance(spec.transform, ImageTransform):
        return np.zeros((spec.transform.size, spec.transform.size, 3), np.uint8)
    return np.zeros(min(_TOKENS, spec.transform.max_tokens), np.int64)

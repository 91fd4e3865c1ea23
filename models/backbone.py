"""A loaded backbone: preprocessing and an ONNX Runtime session, inputs → embeddings."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.arrays import Floats, Prepared
from models.feeds import dummy_input, feed_of, graph_of, probe_inputs, spec_for
from models.preprocess.decoder import Waiting, wait_unseen
from models.preprocess.expense import HEAVY, image_expense, text_expense
from models.preprocess.image import TINY_IMAGE, ImagePreprocessor
from models.preprocess.limits import InputError, InputLimits
from models.preprocess.pixels import with_byte_input
from models.preprocess.text import Silence, TextPreprocessor
from models.runtime.autotune import ExecutionPlan
from models.runtime.cuda import CudaRunner, open_runner
from models.runtime.progress import ThreadProgress
from models.runtime.session import Device, open_session, open_table
from models.runtime.shapes import chunks_of
from models.spec import FLOAT16, OUTPUT_NAME, TOKENIZER_FILE, BackboneSpec, ImageTransform, TextTransform
from models.store.manifest import CorruptExport, read_tables

# Maximum tokens per run on a CPU, padding included. It bounds the memory of a run.
_TOKENS_PER_RUN = 1024
_TUNED_BATCH = 32  # maximum inputs per run of a fine-tuned network on a GPU


@dataclass(frozen=True, slots=True)
class Embedded:
    """The result of embedding n inputs."""

    # float32 (n, dim), in the order of the inputs; the row of a failed input is zero.
    embeddings: Floats
    errors: dict[int, InputError] = field(default_factory=dict)  # errors of failed inputs, by position
    # Seconds by stage: "decode" or "tokenize" and "embed" are worker time spent on these inputs, "queue" is
    # the wait until the first of them was taken.
    timings: dict[str, float] = field(default_factory=dict)
    callers: int = 1  # callers that are answered together
    # Positions of texts without any token known to the backbone; their embeddings are meaningless.
    unknown: frozenset[int] = frozenset()
    truncated: frozenset[int] = frozenset()  # positions of texts of which only the start was read
    tokens: int = 0  # tokens read, over all texts


class Ready(NamedTuple):
    """One preprocessed input. `unknown`, `truncated` and `tokens` are as in Embedded."""

    prepared: Prepared
    unknown: bool = False
    truncated: bool = False
    tokens: int = 0


class Backbone:
    """One exported backbone, loaded. Thread-safe: calls from several threads run concurrently.

    `fingerprint`: the spec's fingerprint, cached because the spec recomputes it on each access. `pace`:
    seconds per element of a prepared input in the first run, which is slower than later ones.
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
        """Load the export folder and run it once, because the first run of a session is slow.

        `threads`: total number of threads on a CPU. `plan`: how to use them, `ExecutionPlan.usual` by
        default. Raises CorruptExport, DeviceUnavailable.
        """
        spec = spec_for(export, device, verify=True)
        preprocessor = (
            ImagePreprocessor(spec.transform, limits)
            if isinstance(spec.transform, ImageTransform)
            else TextPreprocessor(spec.transform, export / TOKENIZER_FILE, limits)
        )
        plan = plan or ExecutionPlan.usual(spec.kind, device, threads)
        # Both CPU sessions share one copy of each table. A GPU keeps its own copy.
        tables = {name: open_table(path) for name, path in read_tables(export).items() if device == "cpu"}
        images = spec.kind == "image"
        session: Any
        if device == "cuda":
            session = open_runner(spec, graph_of(export, spec, plan.half), plan, probe_inputs(preprocessor))
        else:
            session = open_session(
                graph_of(export, spec), device=device, threads=plan.alone, one_shape=images, tables=tables
            )
        # Concurrent runs share the cores best with few threads each, because a run waits for its slowest
        # thread.
        beside = session
        if device == "cpu" and plan.beside != plan.alone:
            beside = open_session(
                graph_of(export, spec), device=device, threads=plan.beside, one_shape=images, tables=tables
            )
        backbone = cls(spec, export, session, beside, preprocessor, device, plan)
        if not backbone._answers():
            backbone.close()
            raise CorruptExport(
                f"{export} does not give {spec.dim} finite numbers. Export the backbone again."
            )
        return backbone

    def with_network(self, graph: bytes) -> Backbone:
        """Return a backbone with the same preprocessing and another network, such as a fine-tuned one.

        `graph`: an ONNX model with the same inputs and output. Raises CorruptExport, InvalidGraph.
        """
        if isinstance(self.spec.transform, ImageTransform):
            graph = with_byte_input(graph, self.spec.transform)
        plan = self.plan
        session: Any
        if self.device == "cuda":
            # All shapes and CUDA graphs for the network of every tenant would fill the GPU's memory.
            plan = replace(plan, batch=min(_TUNED_BATCH, plan.batch), half=False, graphs=False)
            session = open_runner(self.spec, graph, plan, self.probes(), few=True)
        else:
            session = open_session(
                graph, device="cpu", threads=plan.alone, one_shape=self.spec.kind == "image"
            )
        tuned = Backbone(self.spec, self.path, session, session, self._preprocessor, self.device, plan)
        if not tuned._answers():
            tuned.close()
            raise CorruptExport("The fine-tuned network does not give finite embeddings. Fine-tune again.")
        return tuned

    @property
    def precision(self) -> str:
        """The precision of weights and arithmetic, e.g. float32."""
        return FLOAT16 if self.plan.half else self.spec.precision

    @property
    def batch(self) -> int:
        """The maximum number of inputs per run."""
        return self.plan.batch

    @property
    def nbytes(self) -> int:
        """Bytes of memory kept for runs, besides the graph."""
        return self._session.nbytes if isinstance(self._session, CudaRunner) else 0

    @property
    def lost(self) -> bool:
        """Whether the device has failed for this process; only a new process can use it."""
        return isinstance(self._session, CudaRunner) and self._session.lost

    @property
    def runner(self) -> ThreadProgress | None:
        """The progress of the thread that runs submitted batches; None if callers run them themselves."""
        return self._session.progress if isinstance(self._session, CudaRunner) else None

    @property
    def seconds_by_stage(self) -> Mapping[str, float]:
        """Seconds that the GPU thread spent in each of models.runtime.bound_shape.STAGES; empty on a CPU."""
        return self._session.seconds if isinstance(self._session, CudaRunner) else {}

    @property
    def budget(self) -> float:
        """The maximum total cost of a run's inputs: on a CPU, batching does not speed up long inputs."""
        return max(2 * HEAVY, 1.5 * self.batch) if self.device == "cpu" else math.inf

    @property
    def heavy_batch(self) -> int:
        """The maximum number of inputs per run among those whose cost is above HEAVY."""
        return 1 if self.device == "cpu" else self.batch

    @property
    def bulk_batch(self) -> int:
        """The maximum number of bulk inputs per run: one image on a CPU, as more would stay in memory."""
        return 1 if self.device == "cpu" and self.spec.kind == "image" else self.batch

    @property
    def canary(self) -> bytes | str:
        """The smallest valid input, always the same, for health checks."""
        return TINY_IMAGE if self.spec.kind == "image" else "a"

    @property
    def preprocess_stage(self) -> str:
        """The name of the preprocessing stage in timings and metrics: decode or tokenize."""
        return "decode" if self.spec.kind == "image" else "tokenize"

    def expense(self, item: bytes | str) -> float:
        """Estimate an input's cost, in units of a small input's, without reading all of it; see HEAVY."""
        if isinstance(item, bytes):
            return image_expense(item)
        tokens = self.spec.transform.max_tokens if isinstance(self.spec.transform, TextTransform) else 0
        return text_expense(item, tokens)

    def preprocess(self, item: bytes | str) -> Prepared:
        """Preprocess one input for the network. Raises InputError, also for an input of the wrong kind."""
        return self.prepare(item).prepared

    def prepare(self, item: bytes | str, waiting: Waiting = wait_unseen) -> Ready:
        """Preprocess one input, with its token count and flags. Raises as `preprocess` does.

        If another process prepares the input, `waiting(True)` is called before and `waiting(False)` after.
        """
        preprocessor = self._preprocessor
        if isinstance(item, bytes) and isinstance(preprocessor, ImagePreprocessor):
            return Ready(preprocessor(item, waiting))
        if isinstance(item, str) and isinstance(preprocessor, TextPreprocessor):
            prepared, truncated = preprocessor.cut(item)
            return Ready(prepared, self.knows_nothing(item, prepared), truncated, len(prepared))
        raise InputError("wrong_kind", f"The backbone {self.spec.name} takes {self.spec.kind} inputs.")

    def knows_nothing(self, item: bytes | str, prepared: Prepared) -> bool:
        """Whether a prepared text has no token known to the backbone; False for images."""
        if isinstance(item, str) and isinstance(self._preprocessor, TextPreprocessor):
            return self._preprocessor.knows_nothing(item, prepared)
        return False

    @property
    def silence(self) -> Silence | None:
        """How to tell from its tokens that a text is unknown; None for images."""
        return self._preprocessor.silence if isinstance(self._preprocessor, TextPreprocessor) else None

    def unknown(self, inputs: Sequence[bytes | str]) -> frozenset[int]:
        """Find the positions of texts without any known token, without embedding them.

        Inputs that cannot be preprocessed are left out.
        """
        text = self._preprocessor
        return text.where(text.is_unknown, inputs) if isinstance(text, TextPreprocessor) else frozenset()

    def truncated(self, inputs: Sequence[bytes | str]) -> frozenset[int]:
        """Find the positions of texts of which the backbone reads only the start, without embedding them.

        Inputs that cannot be preprocessed are left out.
        """
        text = self._preprocessor
        return text.where(text.is_truncated, inputs) if isinstance(text, TextPreprocessor) else frozenset()

    def run(self, prepared: Sequence[Prepared], *, beside: bool = False) -> Floats:
        """Embed n prepared inputs: float32 (n, dim), in bounded memory for any n.

        `beside`: other runs use the other cores, so this run should keep to few threads (`plan.beside`). A
        row does not depend on the other rows: on a CPU it is within 1e-5 of what it would be alone.
        """
        session = self._beside if beside else self._session
        if session is None:
            raise RuntimeError(f"the backbone {self.spec.name} is closed")
        if isinstance(session, CudaRunner):
            return session.run(prepared)
        session.crew.make_room()
        embeddings = np.zeros((len(prepared), self.spec.dim), np.float32)
        most_tokens = _TOKENS_PER_RUN if self.spec.kind == "text" else None
        for rows in chunks_of(prepared, self.batch, most_tokens):
            embeddings[rows] = session.run([OUTPUT_NAME], self.feed([prepared[row] for row in rows]))[0]
        return embeddings

    def submit(self, prepared: Sequence[Prepared]) -> Future[Floats]:
        """Return a future for the result of `run`; only with a `runner`. See CudaRunner.submit."""
        session = self._session
        if session is None:
            raise RuntimeError(f"the backbone {self.spec.name} is closed")
        return session.submit(prepared)  # type: ignore[no-any-return]

    def probes(self) -> list[Prepared]:
        """Varied prepared inputs, for comparing the embeddings of two ways to run the backbone."""
        return probe_inputs(self._preprocessor)

    def embed(self, inputs: Sequence[bytes | str]) -> Embedded:
        """Preprocess and run in this thread. A service should use a Batcher instead."""
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
                    # A raised error and this frame form a reference cycle. A new error has no traceback.
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
        """Free the network's memory once the current runs end. Later runs raise RuntimeError."""
        if isinstance(self._session, CudaRunner):
            self._session.close()
        self._session = self._beside = None

    def _answers(self) -> bool:
        begin, blank = time.perf_counter(), dummy_input(self.spec)
        embedding = self.run([blank])
        self.pace = (time.perf_counter() - begin) / blank.size
        return embedding.shape == (1, self.spec.dim) and bool(np.isfinite(embedding).all())

    def feed(self, prepared: Sequence[Prepared]) -> dict[str, NDArray[Any]]:
        """Build the graph's inputs for one run of at least one input; texts are padded to the longest."""
        return feed_of(self.spec, prepared)

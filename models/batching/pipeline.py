"""What worker threads do with the inputs that they took: prepare, run, deliver."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from models.arrays import Floats
from models.backbone import Backbone, Ready
from models.batching.fair_queue import FairQueue
from models.batching.input_queue import InputQueue
from models.batching.request import EmbeddingFailed, Part, Position, QueuedRequest, settle
from models.batching.worker_progress import WorkerProgress
from models.preprocess.decoder_child import DecoderUnavailable
from models.preprocess.limits import InputError
from models.runtime.progress import LONGEST_RUN, PATIENCE

logger = logging.getLogger(__name__)

_NEWEST = 0.1  # weight of the newest batch in the running means of the pace
_SLACK = 10.0  # a run may take this many times the duration expected from the measured pace


class Replaced(BaseException):
    """The thread that raises it has been replaced by another."""


@dataclass(frozen=True, slots=True)
class _Batch:
    """Inputs that a thread took together, prepared."""

    inputs: list[tuple[Part, int]]
    good: list[tuple[Position, Ready]]  # inputs that can be run
    spent: list[tuple[Position, float, InputError | None]]  # per input: preparation seconds, error if any
    begun: float  # time.perf_counter() before the preparation
    prepared: float  # time.perf_counter() after the preparation

    @property
    def size(self) -> int:
        """The number of array elements in the run."""
        return sum(ready.prepared.size for _, ready in self.good)

    @property
    def cost(self) -> float:
        """The cost of the inputs; refused ones are left out, because they fail early, whatever their size."""
        return sum(
            part.costs[place]
            for (part, place), (_, _, refusal) in zip(self.inputs, self.spent, strict=True)
            if refusal is None
        )


class BatchPipeline:
    """Prepares and runs the inputs of worker threads, and delivers the results to the callers. Thread-safe.

    `lock` guards the requests and the progress of the workers. `observe` and `observe_batch` are as in
    Batcher.
    """

    def __init__(
        self,
        backbone: Backbone,
        queue: InputQueue,
        lock: threading.Lock,
        observe: Callable[[str, float], None],
        observe_batch: Callable[[int], None],
    ) -> None:
        self._backbone = backbone
        self._queue = queue
        self._lock = lock
        self._observe = observe
        self._observe_batch = observe_batch
        # Thread seconds per element of a prepared input, to predict how long a run takes.
        self._pace = backbone.pace
        self._submitted = 0  # batches that the backbone's own thread has yet to run
        self._ran = threading.Condition(lock)

    def process(self, inputs: list[tuple[Part, int]], worker: WorkerProgress) -> None:
        """Answer the inputs: a bad input fails alone, a failed run fails every caller in it.

        Raises Replaced.
        """
        try:
            batch = self._prepare(inputs, worker)
            if self._backbone.runner is not None:
                self._submit(batch, worker)
                return
            embeddings = self._run(batch, worker)
        except Exception as error:
            self._fail(inputs, error)
            return
        self._deliver(batch, embeddings, worker.lane, time.perf_counter() - batch.begun)

    def wait_for_submitted(self, seconds: float) -> None:
        """Wait until the backbone's own thread has run all submitted batches, or the time has passed."""
        with self._lock:
            self._ran.wait_for(lambda: not self._submitted, seconds)

    def _prepare(self, inputs: list[tuple[Part, int]], worker: WorkerProgress) -> _Batch:
        good: list[tuple[Position, Ready]] = []
        spent: list[tuple[Position, float, InputError | None]] = []
        begun = time.perf_counter()
        for part, place in inputs:
            request, index = one = part.request, part.places[place]
            begin = time.perf_counter()
            refusal = self._set_input(one, worker)
            if refusal is not None:
                spent.append((one, 0.0, refusal))
                continue
            try:
                good.append((one, self._backbone.prepare(request.inputs[index], worker.wait)))
            except InputError as error:
                # A raised error and this frame form a reference cycle. A new error has no traceback.
                refusal = InputError(error.code, error.detail)
            spent.append((one, time.perf_counter() - begin, refusal))
            self._set_input(None, worker)
            worker.steps += 1
        worker.steps += 1
        return _Batch(inputs, good, spent, begun, time.perf_counter())

    def _set_input(self, one: Position | None, worker: WorkerProgress) -> InputError | None:
        """Record which input is being prepared, None after each; return why it is refused, if it is.

        Raises Replaced if the thread has been replaced.
        """
        with self._lock:
            if worker.thread is not threading.current_thread():
                raise Replaced
            worker.input = one
            return None if one is None else worker.refused.get(one)

    def _run(self, batch: _Batch, worker: WorkerProgress) -> Floats:
        beside = self._queue.others_run(worker.priority)
        worker.allowed = min(LONGEST_RUN, max(PATIENCE, _SLACK * batch.size * self._pace))
        try:
            embeddings = self._backbone.run([ready.prepared for _, ready in batch.good], beside=beside)
        finally:
            worker.allowed = 0.0
        worker.steps += 1
        return embeddings

    def _submit(self, batch: _Batch, worker: WorkerProgress) -> None:
        """Hand a batch to the backbone's own thread, so that this one can prepare the next inputs."""
        with self._lock:
            self._submitted += 1
        worker.wait(True)
        try:
            future = self._backbone.submit([ready.prepared for _, ready in batch.good])
        except BaseException:
            with self._lock:
                self._submitted -= 1
            raise
        finally:
            worker.wait(False)
        lane, occupied = worker.lane, time.perf_counter() - batch.begun

        def done(future: Future[Floats]) -> None:
            try:
                error = future.exception()
                if error is None:
                    self._deliver(batch, future.result(), lane, occupied)
                else:
                    self._fail(batch.inputs, error)
            except BaseException:
                logger.exception("what the backbone %s gave is lost", self._backbone.spec.name)
                self._queue.abort("The result of this backbone is lost. Try again in a few seconds.")
            finally:
                with self._lock:
                    self._submitted -= 1
                    self._ran.notify_all()

        future.add_done_callback(done)

    def _deliver(self, batch: _Batch, embeddings: Floats, lane: FairQueue[Part], occupied: float) -> None:
        """Store each result in its request. `occupied`: seconds for which the batch occupied its worker."""
        end = time.perf_counter()
        good, spent, embed_seconds = batch.good, batch.spent, end - batch.prepared
        finished: list[QueuedRequest] = []
        stage = self._backbone.preprocess_stage
        counted = sum(request.counted for (request, _), _ in good)
        cost = batch.cost
        with self._lock:
            for (request, index), seconds, refusal in spent:
                request.timings[stage] += seconds
                if refusal is not None:
                    request.errors[index] = refusal
            for ((request, index), ready), embedding in zip(good, embeddings, strict=True):
                request.embeddings[index] = embedding
                request.timings["embed"] += embed_seconds / len(good)
                request.tokens += ready.tokens
                if ready.unknown:
                    request.unknown.add(index)
                if ready.truncated:
                    request.truncated.add(index)
            for (request, _), _, _ in spent:
                request.pending -= 1
                if not request.pending:
                    finished.append(request)
            if counted:
                lane.pace += _NEWEST * (occupied / cost - lane.pace)
            if batch.size and self._backbone.runner is None:
                self._pace += _NEWEST * (embed_seconds / batch.size - self._pace)

        def report() -> None:
            for (request, _), seconds, _ in spent:
                if request.counted:
                    self._observe(stage, seconds)
            if counted:
                self._observe("embed", embed_seconds)
                self._observe_batch(counted)

        if finished:
            settle(finished, None, report)
        else:
            report()

    def _fail(self, inputs: list[tuple[Part, int]], error: BaseException) -> None:
        """Fail every caller that has one of the inputs."""
        requests = {part.request for part, _ in inputs}
        logger.error(
            "a batch of %d requests failed on the backbone %s",
            len(requests),
            self._backbone.spec.name,
            exc_info=error,
        )
        self._queue.remove(requests)

        def failure() -> Exception:
            if isinstance(error, DecoderUnavailable):
                # The backbone is not at fault, and the condition may be temporary.
                return DecoderUnavailable(str(error))
            failed = EmbeddingFailed("The backbone failed on these inputs; its log has the cause.")
            failed.__cause__ = error
            return failed

        settle(requests, failure)

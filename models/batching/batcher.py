"""A bounded queue and worker threads in front of a backbone; predicts go before bulk."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable, Hashable, Sequence

from models.backbone import Backbone, Embedded
from models.batching.core_sharing import CoreSharing
from models.batching.input_queue import InputQueue
from models.batching.pipeline import BatchPipeline, Replaced
from models.batching.request import DeadlineExceeded, Part, QueuedRequest
from models.batching.worker_progress import WorkerProgress
from models.preprocess.expense import HEAVY
from models.preprocess.limits import InputError
from models.priority import HEAVY_NICENESS, NICENESS, lower_thread_priority
from models.runtime.progress import ThreadProgress

logger = logging.getLogger(__name__)

_CLOSING_SECONDS = 5  # seconds without progress after which `close` stops waiting for the threads
_MOST_LEFT = 3  # maximum threads abandoned with a stuck input, each of which may occupy a core
_LOCK_SECONDS = 0.1  # timeout for the lock, which a stuck thread may hold


class Batcher:
    """Shares one backbone between many callers. Use it from one event loop; it works in its own threads.

    Each worker takes inputs of one or more callers, prepares and runs them, and returns each row to its
    caller, so that decoding on one thread overlaps the network on another. Sources take turns by the cost of
    their inputs, and so do the callers of each source: a large request does not block a small one, and many
    requests of one source do not block another source. Heavy inputs have separate threads, so that light
    ones never wait for them.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        max_queue: int,
        workers: int,
        max_wait: float = math.inf,
        cores: CoreSharing | None = None,
        observe: Callable[[str, float], None] = lambda stage, seconds: None,
        observe_batch: Callable[[int], None] = lambda size: None,
    ) -> None:
        """Create the batcher without starting its threads.

        `max_queue`: maximum number of waiting inputs, counted separately for predicts and bulk, so that bulk
        cannot crowd out predicts; a larger request is accepted when nothing waits. `workers`: threads for
        light predicts, and as many niced ones for heavy predicts and for each lane of bulk; on a CPU, the
        number of cores. `max_wait`: longest expected wait of a predict in seconds, from the cost ahead of it
        and the measured pace; longer ones are refused. `cores`: shared by the batchers that run on the same
        cores; None if there are no others. `observe(stage, seconds)`, with a stage of Embedded.timings, and
        `observe_batch(size)` are called from any of the threads, the event loop's included.
        """
        self.backbone = backbone
        # Guards the queue, the requests, and the progress of the workers.
        self._lock = threading.Lock()
        self._queue = InputQueue(
            backbone,
            self._lock,
            max_queue=max_queue,
            workers=workers,
            max_wait=max_wait,
            cores=cores or CoreSharing(),
            observe=observe,
        )
        self._pipeline = BatchPipeline(backbone, self._queue, self._lock, observe, observe_batch)
        predicts, bulk = self._queue.predicts, self._queue.bulk
        self._workers = [
            WorkerProgress(priority, lane)
            for priority in (predicts, bulk)
            for lane in priority.lanes
            for _ in range(workers)
        ]
        self.progress: list[ThreadProgress] = []
        self._threads: list[threading.Thread] = []
        self._left: list[threading.Thread] = []

    @property
    def depth(self) -> int:
        """The number of waiting inputs, predicts and bulk together."""
        return sum(self.waiting)

    @property
    def waiting(self) -> tuple[int, int]:
        """The numbers of waiting inputs: predicts, bulk."""
        return self._queue.predicts.depth, self._queue.bulk.depth

    @property
    def admitted(self) -> int:
        """The number of counted inputs so far."""
        return self._queue.admitted

    @property
    def neglected(self) -> bool:
        """Whether inputs wait although a thread for them is idle.

        Read without the lock, because a stuck thread may hold it.
        """
        predicts, bulk = self._queue.predicts, self._queue.bulk
        if predicts.depth:
            return any(
                worker.lane.depth and not worker.busy
                for worker in self._workers
                if worker.priority is predicts
            )
        return bulk.depth > 0 and not any(thread.busy for thread in self.progress)

    @property
    def alive(self) -> bool:
        """Whether inputs are accepted and all worker threads are alive."""
        return self._queue.is_open and all(thread.is_alive() for thread in self._threads)

    @property
    def threads_left(self) -> int:
        """The number of worker threads that have not ended, abandoned ones included."""
        return sum(thread.is_alive() for thread in (*self._threads, *self._left))

    async def start(self) -> None:
        """Start the threads. Can be called only once."""
        if self._threads:
            raise RuntimeError("a batcher starts once")
        self._queue.open()
        self.progress += self._workers
        if self.backbone.runner is not None:
            self.progress.append(self.backbone.runner)
        self._threads = [self._hire(worker) for worker in self._workers]
        for thread in self._threads:
            thread.start()

    def _hire(self, worker: WorkerProgress) -> threading.Thread:
        kind = "bulk" if worker.priority is self._queue.bulk else "predict"
        heavy = "-heavy" if worker.lane is worker.priority.heavy else ""
        name = f"{self.backbone.spec.name}-{kind}{heavy}"
        worker.thread = threading.Thread(target=self._work, args=(worker,), name=name, daemon=True)
        return worker.thread

    def refuse(self, worker: ThreadProgress) -> bool:
        """Refuse the input on which a thread is stuck, and let a new thread continue with the rest.

        The old thread ends as soon as it can; the network is not touched. Returns False if the thread is not
        preparing an input, if too many threads have been abandoned, or if the lock is not free in time.
        """
        if not isinstance(worker, WorkerProgress) or not self._lock.acquire(timeout=_LOCK_SECONDS):
            return False
        try:
            suspect, old = worker.input, worker.thread
            self._left = [thread for thread in self._left if thread.is_alive()]
            if suspect is None or old is None or len(self._left) == _MOST_LEFT:
                return False
            worker.refused[suspect] = InputError(
                "input_too_costly", "Preparing the input takes too long. Send a simpler one."
            )
            thread = self._hire(worker)
            self._threads[self._threads.index(old)] = thread
            self._left.append(old)
            worker.input, worker.clock, worker.waits = None, None, False
            worker.steps += 1
        finally:
            self._lock.release()
        thread.start()
        logger.error(
            "an input of %d bytes is refused by the backbone %s: preparing it does not end",
            len(suspect[0].inputs[suspect[1]]),
            self.backbone.spec.name,
        )
        return True

    async def close(self) -> None:
        """Refuse new inputs, finish the queued ones and end the threads. The backbone stays open.

        After five seconds without progress, the threads are abandoned and their callers get BatcherClosed.
        """
        self._queue.close()
        still, before = 0, -1
        for thread in self._threads:
            while thread.is_alive() and still < _CLOSING_SECONDS:
                await asyncio.to_thread(thread.join, 1.0)
                steps = sum(one.steps for one in self.progress)
                still, before = (still + 1 if steps == before else 0), steps
        await asyncio.to_thread(self._pipeline.wait_for_submitted, _CLOSING_SECONDS)
        self.abandon()

    def abandon(self) -> None:
        """Refuse new inputs and raise BatcherClosed for all waiting callers at once.

        Does not wait for the threads: stuck ones are abandoned, the others end.
        """
        self._queue.abort("The backbone hung and is being replaced. Try again in a few seconds.")

    async def embed(
        self,
        inputs: Sequence[bytes | str],
        *,
        bulk: bool = False,
        deadline: float | None = None,
        source: Hashable = None,
        counted: bool = True,
    ) -> Embedded:
        """Embed the inputs, in their order.

        `deadline`: a time of time.monotonic(). `source`: takes turns and has a share of the queue. `counted`:
        False for health checks, which are left out of the metrics and of the measured cost of inputs, and do
        not make bulk leave a core free.

        Raises QueueFull, DeadlineExceeded, BatcherClosed, EmbeddingFailed, DecoderUnavailable. When the
        caller is cancelled or the deadline passes, its waiting inputs are dropped.
        """
        stage = self.backbone.preprocess_stage
        request = QueuedRequest(list(inputs), self.backbone.spec.dim, stage, source, counted, bulk)
        if not inputs:
            return Embedded(request.embeddings, request.errors, request.timings)
        self._split(request)
        try:
            self._queue.admit(request)
            if deadline is None:
                return await request.future
            async with asyncio.timeout(deadline - time.monotonic()):
                return await request.future
        except TimeoutError:
            raise DeadlineExceeded(
                f"{request.pending} of {len(inputs)} inputs were not embedded before the deadline. "
                "Send fewer."
            ) from None
        finally:
            self._queue.remove([request])
            # The parts refer to the request: this breaks the cycle, so that the inputs are freed at once.
            request.parts.clear()

    def check_room(self, source: Hashable = None) -> None:
        """Raise what `embed` would raise for one more light predict of the source, before any work for it."""
        self._queue.check_room(source)

    def _split(self, request: QueuedRequest) -> None:
        """Split the inputs of a request into a light and a heavy part."""
        costs = [self.backbone.expense(item) for item in request.inputs]
        for heavy in (False, True):
            places = [place for place, cost in enumerate(costs) if (cost > HEAVY) is heavy]
            request.parts.append(Part(request, places, [costs[place] for place in places]))

    def _work(self, worker: WorkerProgress) -> None:
        """The main loop of a worker thread. However it ends, no caller is left waiting."""
        try:
            worker.clock = time.pthread_getcpuclockid(threading.get_ident())
            if worker.priority is self._queue.bulk:
                lower_thread_priority(NICENESS)
            elif worker.lane is worker.priority.heavy:
                lower_thread_priority(HEAVY_NICENESS)
            # A replacement thread continues with the inputs that its predecessor had taken.
            while taken := worker.taken or self._queue.take(worker):
                self._pipeline.process(taken, worker)
                # The next inputs may come much later, so the last ones are freed now.
                del taken
                self._queue.finish(worker)
        except Replaced:
            return
        except BaseException:
            logger.exception("a worker of the backbone %s died", self.backbone.spec.name)
            self._queue.abort("A worker of this backbone ended. Try again in a few seconds.")

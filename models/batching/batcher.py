"""A bounded queue and worker threads in front of a backbone; predicts go before bulk."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from models.arrays import Floats, Prepared
from models.backbone import Backbone, Embedded, Ready
from models.batching.core_sharing import CoreSharing
from models.batching.fair_queue import FairQueue, Priority
from models.batching.request import (
    BatcherClosed,
    DeadlineExceeded,
    EmbeddingFailed,
    Overloaded,
    Part,
    QueuedRequest,
    settle,
)
from models.batching.worker_progress import WorkerProgress
from models.preprocess.decoder import DecoderUnavailable
from models.preprocess.expense import HEAVY
from models.preprocess.limits import InputError
from models.priority import HEAVY_NICENESS, NICENESS, lower_thread_priority
from models.runtime.progress import LONGEST_RUN, PATIENCE, ThreadProgress

logger = logging.getLogger(__name__)

# Seconds after the last predict during which bulk leaves one core free: a thread that wakes on a busy core
# may wait for the next tick of the kernel's clock, whatever its priority.
_PREDICTS_STAY = 0.5

_NEWEST = 0.1  # weight of the newest batch in the running means of the pace

_SLACK = 10.0  # a run may take this many times the duration expected from the measured pace
_CLOSING_SECONDS = 5  # seconds without progress after which `close` stops waiting for the threads

_MOST_LEFT = 3  # maximum threads abandoned with a stuck input, each of which may occupy a core
_LOCK_SECONDS = 0.1  # timeout for the lock, which a stuck thread may hold

# An input that a thread has taken: its request, and its position there.
_Taken = tuple[QueuedRequest, int]


@dataclass(frozen=True, slots=True)
class _Batch:
    """Inputs that a thread took together."""

    inputs: list[tuple[Part, int]]
    good: list[tuple[_Taken, Ready]]  # inputs that can be run
    spent: list[tuple[_Taken, float, InputError | None]]  # per input: preparation seconds, error if any
    begun: float  # time.perf_counter() before the preparation
    prepared: float  # time.perf_counter() after the preparation

    @property
    def size(self) -> int:
        """The number of array elements in the run."""
        return sum(ready.prepared.size for _, ready in self.good)

    @property
    def requests(self) -> set[QueuedRequest]:
        return {request for (request, _), _, _ in self.spent}


# A lane of a priority, and the progress of its threads.
_Crew = tuple[Priority[Part], FairQueue[Part], list[WorkerProgress]]


class _Left(BaseException):
    """The thread that raises it has been replaced by another."""


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
        self._max_queue = max_queue
        self._workers = workers
        self._max_wait = max_wait
        self._cores = cores or CoreSharing()
        self._observe = observe
        self._observe_batch = observe_batch
        self._lock = threading.Lock()
        self._predicts: Priority[Part] = Priority(self._lock)
        self._bulk: Priority[Part] = Priority(self._lock)
        self._unanswered: set[QueuedRequest] = set()
        # Thread seconds per element of a prepared input, to predict how long a run takes.
        self._pace = backbone.pace
        self.turns: list[ThreadProgress] = []
        self._crews: list[_Crew] = []
        self._threads: list[threading.Thread] = []
        self._left: list[threading.Thread] = []
        self.admitted = 0  # counted inputs so far
        self._submitted = 0  # batches that the backbone's own thread has yet to run
        self._ran = threading.Condition(self._lock)
        self._open = False
        self._predicts_until = 0.0

    @property
    def depth(self) -> int:
        """The number of waiting inputs, predicts and bulk together."""
        return self._predicts.depth + self._bulk.depth

    @property
    def waiting(self) -> tuple[int, int]:
        """The numbers of waiting inputs: predicts, bulk."""
        return self._predicts.depth, self._bulk.depth

    @property
    def neglected(self) -> bool:
        """Whether inputs wait although a thread for them is idle.

        Read without the lock, because a stuck thread may hold it.
        """
        if self._predicts.depth:
            return any(
                lane.depth and not all(turn.busy for turn in turns)
                for priority, lane, turns in self._crews
                if priority is self._predicts
            )
        return self._bulk.depth > 0 and not any(turn.busy for turn in self.turns)

    @property
    def alive(self) -> bool:
        """Whether inputs are accepted and all worker threads are alive."""
        return self._open and all(thread.is_alive() for thread in self._threads)

    @property
    def threads_left(self) -> int:
        """The number of worker threads that have not ended, abandoned ones included."""
        return sum(thread.is_alive() for thread in (*self._threads, *self._left))

    async def start(self) -> None:
        """Start the threads. Can be called only once."""
        if self._threads:
            raise RuntimeError("a batcher starts once")
        self._open = True
        self._cores.join(self._predicts)
        for kind, priority in (("predict", self._predicts), ("bulk", self._bulk)):
            for lane in priority.lanes:
                name = f"{self.backbone.spec.name}-{kind}" + ("-heavy" if lane is priority.heavy else "")
                turns = [WorkerProgress() for _ in range(self._workers)]
                self.turns += turns
                self._crews.append((priority, lane, turns))
                self._threads += [self._hire(name, priority, lane, turn) for turn in turns]
        if self.backbone.runner is not None:
            self.turns.append(self.backbone.runner)
        for thread in self._threads:
            thread.start()

    def _hire(
        self, name: str, priority: Priority[Part], lane: FairQueue[Part], turn: WorkerProgress
    ) -> threading.Thread:
        turn.thread = threading.Thread(target=self._work, args=(priority, lane, turn), name=name, daemon=True)
        return turn.thread

    def refuse(self, turn: ThreadProgress) -> bool:
        """Refuse the input on which a thread is stuck, and let a new thread continue with the rest.

        The old thread ends as soon as it can; the network is not touched. Returns False if the thread is not
        preparing an input, if too many threads have been abandoned, or if the lock is not free in time.
        """
        if not isinstance(turn, WorkerProgress) or not self._lock.acquire(timeout=_LOCK_SECONDS):
            return False
        try:
            suspect, old = turn.input, turn.thread
            self._left = [thread for thread in self._left if thread.is_alive()]
            if suspect is None or old is None or len(self._left) == _MOST_LEFT:
                return False
            turn.refused[suspect] = InputError(
                "input_too_costly", "Preparing the input takes longer than any may; send a simpler one."
            )
            priority, lane, _ = next(crew for crew in self._crews if turn in crew[-1])
            thread = self._hire(old.name, priority, lane, turn)
            self._threads[self._threads.index(old)] = thread
            self._left.append(old)
            turn.input, turn.clock, turn.waits = None, None, False
            turn.steps += 1
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
        with self._lock:
            self._open = False
            self._wake_all()
        still, before = 0, -1
        for thread in self._threads:
            while thread.is_alive() and still < _CLOSING_SECONDS:
                await asyncio.to_thread(thread.join, 1.0)
                steps = sum(turn.steps for turn in self.turns)
                still, before = (still + 1 if steps == before else 0), steps
        await asyncio.to_thread(self._wait_for_submitted)
        self._cores.leave(self._predicts)
        if self.threads_left or self._submitted:
            self.abandon()

    def _wait_for_submitted(self) -> None:
        with self._lock:
            self._ran.wait_for(lambda: not self._submitted, _CLOSING_SECONDS)

    def abandon(self) -> None:
        """Refuse new inputs and raise BatcherClosed for all waiting callers at once.

        Does not wait for the threads: stuck ones are abandoned, the others end.
        """
        self._give_up("This backbone hangs and is replaced; try again in a few seconds.")

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

        Raises Overloaded, DeadlineExceeded, BatcherClosed, EmbeddingFailed, DecoderUnavailable. When the
        caller is cancelled or the deadline passes, its waiting inputs are dropped.
        """
        stage = self.backbone.preprocess_stage
        request = QueuedRequest(list(inputs), self.backbone.spec.dim, stage, source, counted, bulk)
        if not inputs:
            return Embedded(request.embeddings, request.errors, request.timings)
        priority = self._bulk if bulk else self._predicts
        self._share_out(request)
        try:
            self._admit(priority, request)
            if deadline is None:
                return await request.future
            async with asyncio.timeout(deadline - time.monotonic()):
                return await request.future
        except TimeoutError:
            raise DeadlineExceeded(
                f"The deadline passed with {request.pending} of {len(inputs)} inputs to go; send fewer."
            ) from None
        finally:
            self._forget([request])
            # The parts refer to the request: this breaks the cycle, so that the inputs are freed at once.
            request.parts.clear()

    def check_room(self, source: Hashable = None) -> None:
        """Raise what `embed` would raise for one more light predict of the source, before any work for it."""
        with self._lock:
            self._check_room(self._predicts, source, 1, (1.0, 0.0))

    def _share_out(self, request: QueuedRequest) -> None:
        """Split the inputs of a request into a light and a heavy part."""
        costs = [self.backbone.expense(item) for item in request.inputs]
        for heavy in (False, True):
            places = [place for place, cost in enumerate(costs) if (cost > HEAVY) is heavy]
            request.parts.append(Part(request, places, [costs[place] for place in places]))

    def _check_room(
        self, priority: Priority[Part], source: Hashable, count: int, costs: tuple[float, float]
    ) -> None:
        """Raise Overloaded or BatcherClosed. `costs`: of the light inputs, and of the heavy ones."""
        if not self._open:
            raise BatcherClosed("This backbone takes no inputs now; try again in a few seconds.")
        surplus = priority.depth + count - self._max_queue
        if surplus > 0 and priority.depth > 0 and not priority.has_share(source, count, self._max_queue):
            share = min(1.0, surplus / priority.depth)
            raise Overloaded(share * priority.seconds / self._workers)
        if priority is not self._predicts:
            return
        for lane, cost in zip(priority.lanes, costs, strict=True):
            pace = lane.pace / self._workers
            if cost and lane.cost * pace > self._max_wait:
                wait = lane.ahead(source, cost) * pace
                if wait > self._max_wait:
                    raise Overloaded(wait - self._max_wait)

    def _admit(self, priority: Priority[Part], request: QueuedRequest) -> None:
        light, heavy = request.parts
        with self._lock:
            costs = sum(light.costs), sum(heavy.costs)
            self._check_room(priority, request.source, len(request.inputs), costs)
            self._unanswered.add(request)
            if request.counted:
                self.admitted += len(request.inputs)
            if priority is self._predicts and request.counted:
                self._predicts_until = time.monotonic() + _PREDICTS_STAY
            for lane, part in zip(priority.lanes, request.parts, strict=True):
                if part.places:
                    lane.add(part)
                    lane.ready.notify(min(len(part.places), self._workers))

    def _work(self, priority: Priority[Part], lane: FairQueue[Part], turn: WorkerProgress) -> None:
        """The main loop of a worker thread. However it ends, no caller is left waiting."""
        try:
            turn.clock = time.pthread_getcpuclockid(threading.get_ident())
            if priority is self._bulk:
                lower_thread_priority(NICENESS)
            elif lane is priority.heavy:
                lower_thread_priority(HEAVY_NICENESS)
            # A replacement thread continues with the inputs that its predecessor had taken.
            while taken := turn.taken or self._take(priority, lane, turn):
                self._answer(taken, priority, lane, turn)
                # The next inputs may come much later, so the last ones are freed now.
                del taken
                with self._lock:
                    turn.taken, turn.busy = [], False
                    turn.refused.clear()
                    lane.running -= 1
                    if priority is self._bulk:
                        self._let_bulk_look()
        except _Left:
            return
        except BaseException:
            logger.exception("a worker of the backbone %s died", self.backbone.spec.name)
            self._give_up("A worker of this backbone died; try again in a few seconds.")

    def _give_up(self, why: str) -> None:
        """Close the batcher and fail all unanswered requests: without a thread, it could stall unnoticed."""
        with self._lock:
            self._open = False
            unanswered = list(self._unanswered)
        self._cores.leave(self._predicts)
        self._forget(unanswered)
        with self._lock:
            self._wake_all()
        settle(unanswered, lambda: BatcherClosed(why))

    def _wake_all(self) -> None:
        """Wake every idle thread, to check whether it should end."""
        for _, lane, _ in self._crews:
            lane.ready.notify_all()

    def _forget(self, requests: Iterable[QueuedRequest]) -> None:
        """Drop the waiting inputs of some requests."""
        with self._lock:
            for request in requests:
                if request not in self._unanswered:
                    continue
                self._unanswered.discard(request)
                priority = self._bulk if request.bulk else self._predicts
                for lane, part in zip(priority.lanes, request.parts, strict=True):
                    lane.remove(part)
            self._let_bulk_look()

    def _take(
        self, priority: Priority[Part], lane: FairQueue[Part], turn: WorkerProgress
    ) -> list[tuple[Part, int]]:
        """Wait for the next inputs of a lane, from one or more callers; empty when the batcher has closed."""
        with self._lock:
            while not lane.depth or (priority is self._bulk and not self._bulk_may_run(lane)):
                if not self._open and not lane.depth:
                    return []
                lane.ready.wait(_PREDICTS_STAY if lane.depth else None)
            taken = lane.take(self._room(priority, lane), self.backbone.budget)
            now = time.perf_counter()
            begun = {part.request for part, _ in taken if not part.request.begun}
            for request in begun:
                request.begun = True
                request.timings["queue"] = now - request.arrived
            lane.running += 1
            turn.taken = taken
            turn.allowed = 0.0
            turn.busy = True
            turn.steps += 1
            self._let_bulk_look()
        for request in begun:
            if request.counted:
                self._observe("queue", now - request.arrived)
        return taken

    def _room(self, priority: Priority[Part], lane: FairQueue[Part]) -> int:
        """The number of inputs that a thread may take at once.

        Usually this is one worker's share of the lane: the inputs of a single caller are spread over the
        threads, and a thread that finishes finds more work while callers read their answers and ask again.
        If another backbone uses the cores too, it is the whole lane: several smaller runs would be slower.
        """
        bulk = priority is self._bulk
        most = self.backbone.bulk_batch if bulk else self.backbone.batch
        if lane is priority.heavy:
            most = min(most, self.backbone.heavy_batch)
        shared = bulk or not self._cores.others_run(priority)
        return max(1, min(most, -(-lane.depth // self._workers) if shared else lane.depth))

    def _let_bulk_look(self) -> None:
        """Wake bulk threads that waited for predicts; those of an empty lane would only get in the way."""
        if not self._predicts.depth:
            for lane in self._bulk.lanes:
                if lane.depth:
                    lane.ready.notify_all()

    def _bulk_may_run(self, lane: FairQueue[Part]) -> bool:
        """Whether bulk may start a batch: not while predicts wait, and not on the core left for recent ones.

        Heavy bulk gives way to waiting light bulk.
        """
        if self._predicts.depth:
            return False
        most = max(1, self._workers - (time.monotonic() < self._predicts_until))
        if lane is self._bulk.light:
            return lane.running < most
        return not self._bulk.light.depth and self._bulk.running < most

    def _others(self, priority: Priority[Part]) -> bool:
        """Whether other threads run or are about to, so that each run is fastest on one core.

        Niced bulk counts too: the threads of a run wait for each other, hence for the one that bulk delays.
        """
        with self._lock:
            if priority.running > 1 or priority.depth > 0 or self._bulk.running > 0:
                return True
        return self._cores.others_run(priority)

    def _answer(
        self,
        inputs: list[tuple[Part, int]],
        priority: Priority[Part],
        lane: FairQueue[Part],
        turn: WorkerProgress,
    ) -> None:
        """Prepare and run the inputs: a bad input fails alone, a failed run fails every caller in it."""
        taken: list[_Taken] = [(part.request, part.places[place]) for part, place in inputs]
        begun = time.perf_counter()
        try:
            good, spent = self._prepare(taken, turn)
            batch = _Batch(inputs, good, spent, begun, time.perf_counter())
            rows = [ready.prepared for _, ready in good]
            turn.steps += 1
            if self.backbone.runner is not None:
                self._submit(batch, rows, lane, turn)
                return
            beside = priority is self._bulk or self._others(priority)
            turn.allowed = min(LONGEST_RUN, max(PATIENCE, _SLACK * batch.size * self._pace))
            try:
                embeddings = self.backbone.run(rows, beside=beside)
            finally:
                turn.allowed = 0.0
            turn.steps += 1
        except Exception as error:
            self._fail({request for request, _ in taken}, error)
            return
        self._finish(batch, embeddings, lane, time.perf_counter() - begun)

    def _submit(
        self, batch: _Batch, rows: list[Prepared], lane: FairQueue[Part], turn: WorkerProgress
    ) -> None:
        """Hand a batch to the backbone's own thread, so that this one can prepare the next inputs."""
        with self._lock:
            self._submitted += 1
        turn.wait(True)
        try:
            future = self.backbone.submit(rows)
        except BaseException:
            with self._lock:
                self._submitted -= 1
            raise
        finally:
            turn.wait(False)
        occupied = time.perf_counter() - batch.begun

        def done(future: Future[Floats]) -> None:
            try:
                error = future.exception()
                if error is None:
                    self._finish(batch, future.result(), lane, occupied)
                else:
                    self._fail(batch.requests, error)
            except BaseException:
                logger.exception("what the backbone %s gave is lost", self.backbone.spec.name)
                self._give_up("What this backbone gave is lost; try again in a few seconds.")
            finally:
                with self._lock:
                    self._submitted -= 1
                    self._ran.notify_all()

        future.add_done_callback(done)

    def _finish(self, batch: _Batch, embeddings: Floats, lane: FairQueue[Part], occupied: float) -> None:
        """Store each result in its request. `occupied`: seconds for which the batch occupied its worker."""
        end = time.perf_counter()
        good, spent, embed_seconds = batch.good, batch.spent, end - batch.prepared
        finished: list[QueuedRequest] = []
        stage = self.backbone.preprocess_stage
        counted = sum(request.counted for (request, _), _ in good)
        # Refused inputs are left out: they fail early, whatever size they claim to have.
        cost = sum(
            part.costs[place]
            for (part, place), (_, _, refusal) in zip(batch.inputs, spent, strict=True)
            if refusal is None
        )
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
            if batch.size and self.backbone.runner is None:
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

    def _prepare(
        self, taken: list[_Taken], turn: WorkerProgress
    ) -> tuple[list[tuple[_Taken, Ready]], list[tuple[_Taken, float, InputError | None]]]:
        """Prepare the inputs; return those that can be run, and the seconds and error of each input."""
        good: list[tuple[_Taken, Ready]] = []
        spent: list[tuple[_Taken, float, InputError | None]] = []
        for one in taken:
            request, index = one
            begin = time.perf_counter()
            refusal = self._turn_to(one, turn)
            if refusal is not None:
                spent.append((one, 0.0, refusal))
                continue
            try:
                good.append((one, self.backbone.prepare(request.inputs[index], turn.wait)))
            except InputError as error:
                # A raised error and this frame form a reference cycle. A new error has no traceback.
                refusal = InputError(error.code, error.detail)
            spent.append((one, time.perf_counter() - begin, refusal))
            self._turn_to(None, turn)
            turn.steps += 1
        return good, spent

    def _turn_to(self, one: _Taken | None, turn: WorkerProgress) -> InputError | None:
        """Record which input is being prepared, None after each; return why it is refused, if it is.

        Raises _Left if the thread has been replaced.
        """
        with self._lock:
            if turn.thread is not threading.current_thread():
                raise _Left
            turn.input = one
            return None if one is None else turn.refused.get(one)

    def _fail(self, requests: set[QueuedRequest], error: BaseException) -> None:
        logger.error(
            "a batch of %d requests failed on the backbone %s",
            len(requests),
            self.backbone.spec.name,
            exc_info=error,
        )
        self._forget(requests)

        def failure() -> Exception:
            if isinstance(error, DecoderUnavailable):
                # The backbone is not at fault, and the condition may be temporary.
                return DecoderUnavailable(str(error))
            failed = EmbeddingFailed("The backbone failed on these inputs; its log has the cause.")
            failed.__cause__ = error
            return failed

        settle(requests, failure)

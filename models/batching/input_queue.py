"""The waiting inputs of a batcher: whether more are admitted, and which a worker thread takes next."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Iterable

from models.backbone import Backbone
from models.batching.core_sharing import CoreSharing
from models.batching.fair_queue import FairQueue, Priority
from models.batching.request import BatcherClosed, Part, QueuedRequest, QueueFull, settle
from models.batching.worker_progress import WorkerProgress

# Seconds after the last predict during which bulk leaves one core free: a thread that wakes on a busy core
# may wait for the next tick of the kernel's clock, whatever its priority.
_PREDICTS_STAY = 0.5


class InputQueue:
    """The bounded queue of inputs in front of a backbone; predicts go before bulk. Thread-safe.

    `predicts` and `bulk` are guarded by the lock. `admitted`: number of counted inputs so far. The other
    arguments are as in Batcher.
    """

    def __init__(
        self,
        backbone: Backbone,
        lock: threading.Lock,
        *,
        max_queue: int,
        workers: int,
        max_wait: float,
        cores: CoreSharing,
        observe: Callable[[str, float], None],
    ) -> None:
        self.predicts: Priority[Part] = Priority(lock)
        self.bulk: Priority[Part] = Priority(lock)
        self.is_open = False
        self.admitted = 0
        self._backbone = backbone
        self._lock = lock
        self._max_queue = max_queue
        self._workers = workers
        self._max_wait = max_wait
        self._cores = cores
        self._observe = observe
        self._unanswered: set[QueuedRequest] = set()
        self._predicts_until = 0.0

    def open(self) -> None:
        """Accept inputs from now on."""
        self.is_open = True
        self._cores.join(self.predicts)

    def close(self) -> None:
        """Refuse new inputs. Threads find the queued ones, and then none."""
        with self._lock:
            self.is_open = False
            self._wake_all()

    def abort(self, why: str) -> None:
        """Close the queue and raise BatcherClosed for all unanswered callers."""
        with self._lock:
            self.is_open = False
            unanswered = list(self._unanswered)
            self._remove(unanswered)
            self._wake_all()
        self._cores.leave(self.predicts)
        settle(unanswered, lambda: BatcherClosed(why))

    def check_room(self, source: Hashable) -> None:
        """Raise what `admit` would raise for one more light predict of the source."""
        with self._lock:
            self._check_room(self.predicts, source, 1, (1.0, 0.0))

    def admit(self, request: QueuedRequest) -> None:
        """Queue the parts of a request. Raises QueueFull, BatcherClosed."""
        priority = self.bulk if request.bulk else self.predicts
        light, heavy = request.parts
        with self._lock:
            costs = sum(light.costs), sum(heavy.costs)
            self._check_room(priority, request.source, len(request.inputs), costs)
            self._unanswered.add(request)
            if request.counted:
                self.admitted += len(request.inputs)
            if priority is self.predicts and request.counted:
                self._predicts_until = time.monotonic() + _PREDICTS_STAY
            for lane, part in zip(priority.lanes, request.parts, strict=True):
                if part.places:
                    lane.add(part)
                    lane.ready.notify(min(len(part.places), self._workers))

    def remove(self, requests: Iterable[QueuedRequest]) -> None:
        """Drop the waiting inputs of some requests, whose callers no longer need an answer."""
        with self._lock:
            self._remove(requests)

    def take(self, worker: WorkerProgress) -> list[tuple[Part, int]]:
        """Wait for the next inputs of a worker's lane; empty when the queue has closed.

        The worker must call `finish` when it is done with them.
        """
        priority, lane = worker.priority, worker.lane
        with self._lock:
            while not lane.depth or (priority is self.bulk and not self._bulk_may_run(lane)):
                if not self.is_open and not lane.depth:
                    return []
                lane.ready.wait(_PREDICTS_STAY if lane.depth else None)
            taken = lane.take(self._room(priority, lane), self._backbone.budget)
            now = time.perf_counter()
            begun = {part.request for part, _ in taken if not part.request.begun}
            for request in begun:
                request.begun = True
                request.timings["queue"] = now - request.arrived
            lane.running += 1
            worker.taken = taken
            worker.allowed = 0.0
            worker.busy = True
            worker.steps += 1
            self._let_bulk_look()
        for request in begun:
            if request.counted:
                self._observe("queue", now - request.arrived)
        return taken

    def finish(self, worker: WorkerProgress) -> None:
        """Record that a worker is done with the inputs that it had taken."""
        with self._lock:
            worker.taken, worker.busy = [], False
            worker.refused.clear()
            worker.lane.running -= 1
            if worker.priority is self.bulk:
                self._let_bulk_look()

    def others_run(self, priority: Priority[Part]) -> bool:
        """Whether other threads run beside one of the priority or soon will: each run then needs one core.

        Niced bulk counts too: the threads of a run wait for each other, hence for the one that bulk delays.
        """
        if priority is self.bulk:
            return True
        with self._lock:
            if priority.running > 1 or priority.depth > 0 or self.bulk.running > 0:
                return True
        return self._cores.others_run(priority)

    def _check_room(
        self, priority: Priority[Part], source: Hashable, count: int, costs: tuple[float, float]
    ) -> None:
        """Raise QueueFull or BatcherClosed. `costs`: of the light inputs, and of the heavy ones."""
        if not self.is_open:
            raise BatcherClosed("The backbone takes no inputs now. Try again in a few seconds.")
        surplus = priority.depth + count - self._max_queue
        if surplus > 0 and priority.depth > 0 and not priority.has_share(source, count, self._max_queue):
            share = min(1.0, surplus / priority.depth)
            raise QueueFull(share * priority.seconds / self._workers)
        if priority is not self.predicts:
            return
        for lane, cost in zip(priority.lanes, costs, strict=True):
            pace = lane.pace / self._workers
            if cost and lane.cost * pace > self._max_wait:
                wait = lane.ahead(source, cost) * pace
                if wait > self._max_wait:
                    raise QueueFull(wait - self._max_wait)

    def _remove(self, requests: Iterable[QueuedRequest]) -> None:
        for request in requests:
            if request not in self._unanswered:
                continue
            self._unanswered.discard(request)
            priority = self.bulk if request.bulk else self.predicts
            for lane, part in zip(priority.lanes, request.parts, strict=True):
                lane.remove(part)
        self._let_bulk_look()

    def _wake_all(self) -> None:
        """Wake every idle thread, to check whether it should end."""
        for lane in (*self.predicts.lanes, *self.bulk.lanes):
            lane.ready.notify_all()

    def _room(self, priority: Priority[Part], lane: FairQueue[Part]) -> int:
        """The number of inputs that a thread may take at once.

        Usually this is one worker's share of the lane: the inputs of a single caller are spread over the
        threads, and a thread that finishes finds more work while callers read their answers and ask again.
        If another backbone uses the cores too, it is the whole lane: several smaller runs would be slower.
        """
        bulk = priority is self.bulk
        most = self._backbone.bulk_batch if bulk else self._backbone.batch
        if lane is priority.heavy:
            most = min(most, self._backbone.heavy_batch)
        shared = bulk or not self._cores.others_run(priority)
        return max(1, min(most, -(-lane.depth // self._workers) if shared else lane.depth))

    def _let_bulk_look(self) -> None:
        """Wake bulk threads that waited for predicts; those of an empty lane would only get in the way."""
        if not self.predicts.depth:
            for lane in self.bulk.lanes:
                if lane.depth:
                    lane.ready.notify_all()

    def _bulk_may_run(self, lane: FairQueue[Part]) -> bool:
        """Whether bulk may start a batch: not while predicts wait, and not on the core left for recent ones.

        Heavy bulk gives way to waiting light bulk.
        """
        if self.predicts.depth:
            return False
        most = max(1, self._workers - (time.monotonic() < self._predicts_until))
        if lane is self.bulk.light:
            return lane.running < most
        return not self.bulk.light.depth and self.bulk.running < most

"""Decoding of images with a high or unpredictable cost, in processes that can be killed.

A thread that decodes cannot be stopped. Such an image therefore goes to a separate process with limits on CPU
time and memory; an image that exceeds them is refused and affects nothing else.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from typing import Final

from PIL import Image

from models.preprocess.decoder_child import DecoderChild, DecoderEnded
from models.preprocess.image_file.facts import NOT_AN_IMAGE, ImageFile
from models.preprocess.limits import InputError, InputLimits
from models.spec import ImageTransform

MEMORY_BYTES: Final = 512 << 20
"""Memory that decoding one image may take."""
PROCESSES: Final = 2
"""Maximum processes that decode at a time, besides one for small images; each takes up to MEMORY_BYTES."""

_SMALL: Final = 1_200_000  # pixels plus bytes up to which an image is small
_BASE_SECONDS: Final = 1.0  # CPU time allowed for an image of no pixels
_SECONDS_PER_PIXEL: Final = 100e-9  # CPU time; a progressive JPEG takes up to 50e-9 on a machine of 2024

Waiting = Callable[[bool], None]


def wait_unseen(waits: bool) -> None:
    """Do nothing, for callers whose waiting is not monitored."""


class Decoder:
    """A pool of at most `processes` decoding processes, started on demand and reused. Thread-safe.

    There is one more process for small images, which would otherwise wait for seconds behind large ones.

    `ended`: number of processes that were killed, crashed, or ran out of memory while decoding an image.
    """

    def __init__(
        self,
        processes: int = PROCESSES,
        *,
        base_seconds: float = _BASE_SECONDS,
        memory_bytes: int = MEMORY_BYTES,
    ) -> None:
        """Create the pool without processes. `base_seconds`: CPU time allowed besides that for pixels."""
        self.ended = 0
        self._base_seconds = base_seconds
        self._memory_bytes = memory_bytes
        self._room = threading.BoundedSemaphore(processes)
        self._room_for_small = threading.BoundedSemaphore(1)
        self._lock = threading.Lock()
        self._idle: list[DecoderChild] = []

    @staticmethod
    @cache
    def shared() -> Decoder:
        """The decoder that this process shares."""
        return Decoder()

    def decode(
        self,
        file: ImageFile,
        transform: ImageTransform,
        limits: InputLimits = InputLimits(),
        waiting: Waiting = wait_unseen,
    ) -> Image.Image:
        """Decode in another process; the result is that of ImagePreprocessor.square.

        `waiting(True)` is called before and `waiting(False)` after; in between, this thread waits for a
        limited time. Raises InputError, also if the image made the process end, and DecoderUnavailable.
        """
        small = file.width * file.height + len(file.data) <= _SMALL
        waiting(True)
        try:
            with self._room_for_small if small else self._room:
                try:
                    return self._decode(file, transform, limits)
                except DecoderEnded as ended:
                    if not ended.by_chance:
                        raise
                    return self._decode(file, transform, limits)
        except DecoderEnded as ended:
            if ended.crashed:
                raise InputError("undecodable_image", NOT_AN_IMAGE) from None
            raise InputError(
                "input_too_costly",
                "Decoding the image takes too much time or memory for its size. Save it again, or smaller.",
            ) from None
        finally:
            waiting(False)

    def _decode(self, file: ImageFile, transform: ImageTransform, limits: InputLimits) -> Image.Image:
        """Decode in one process. Raises InputError, DecoderUnavailable, DecoderEnded."""
        process = self._take()
        seconds = self._base_seconds + _SECONDS_PER_PIXEL * file.width * file.height
        try:
            return process.decode(file, transform, limits, seconds)
        except InputError:
            raise
        except BaseException:
            # The process may be in the middle of a request.
            process.end()
            raise
        finally:
            self._give_back(process)

    def close(self) -> None:
        """Kill the idle processes."""
        with self._lock:
            idle, self._idle = self._idle, []
        for process in idle:
            process.end()

    def _take(self) -> DecoderChild:
        while True:
            with self._lock:
                process = self._idle.pop() if self._idle else None
            if process is None:
                return DecoderChild(self._memory_bytes)
            if process.alive:
                return process
            process.end()

    def _give_back(self, process: DecoderChild) -> None:
        """Keep the process for later images, or count it if it has ended."""
        with self._lock:
            if process.alive:
                self._idle.append(process)
            else:
                self.ended += 1

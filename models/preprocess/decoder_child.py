"""One decoding process, as its parent sees it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict
from typing import IO, Final

from PIL import Image

from models.child import plain_environment
from models.errors import Unavailable
from models.preprocess.image_file.facts import ImageFile
from models.preprocess.limits import InputError, InputLimits
from models.spec import ImageTransform

_START_SECONDS: Final = 30.0
# Wall time allowed for an image. The process is niced and the machine may be busy, so this is only exceeded
# when decoding hangs.
_WALL_SECONDS: Final = 120.0
_PIPE_BYTES: Final = 1 << 20

# A request begins with the sizes of a JSON header and of the file. An answer begins with width and height, or
# with 0 and the size of a JSON error.
REQUEST: Final = struct.Struct("<QQ")
ANSWER: Final = struct.Struct("<QQ")
READY: Final = b"\1"

_CRASHES: Final = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)
_OUT_OF_TIME: Final = (signal.SIGPROF, signal.SIGXCPU)


class DecoderUnavailable(Unavailable):
    """No process for decoding images can be started."""

    code = "decoder_unavailable"


class DecoderEnded(Exception):
    """The process ended before it answered.

    `status`: its exit status, negative if a signal ended it. `late`: it was killed after its time limit.
    """

    def __init__(self, status: int, late: bool) -> None:
        super().__init__(str(status))
        self.status = status
        self.late = late

    @property
    def crashed(self) -> bool:
        """Whether the decoder crashed."""
        return -self.status in _CRASHES

    @property
    def by_chance(self) -> bool:
        """Whether an operator or a lack of memory, rather than the image, may have ended the process."""
        return not self.late and not self.crashed and -self.status not in _OUT_OF_TIME


class DecoderChild:
    """One decoding process. For use by one thread at a time."""

    def __init__(self, memory_bytes: int) -> None:
        """Start the process and wait until it is ready. Raises DecoderUnavailable."""
        self._late = False
        # Linear algebra libraries reserve memory for each thread that they might use.
        environment = plain_environment() | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "models.preprocess.decoder_process", str(memory_bytes)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                env=environment,
            )
        except OSError as error:
            raise DecoderUnavailable(f"No process to decode images can be started: {error}") from error
        for pipe in (self._input, self._output):
            # Larger pipes carry more of an image at once. If that is not allowed, the default size works too.
            with contextlib.suppress(OSError, AttributeError):
                fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        try:
            with self._ended_after(_START_SECONDS):
                self._read(len(READY))
        except DecoderEnded as ended:
            raise DecoderUnavailable(
                f"The process to decode images ended with status {ended.status} before it was ready."
            ) from None

    @property
    def alive(self) -> bool:
        """Whether the process is still running."""
        return self._process.poll() is None

    @property
    def _input(self) -> IO[bytes]:
        assert self._process.stdin is not None
        return self._process.stdin

    @property
    def _output(self) -> IO[bytes]:
        assert self._process.stdout is not None
        return self._process.stdout

    def decode(
        self, file: ImageFile, transform: ImageTransform, limits: InputLimits, seconds: float
    ) -> Image.Image:
        """Decode one file. Raises InputError as reported by the process, and DecoderEnded if it has ended.

        The process cannot be used after DecoderEnded.
        """
        header = json.dumps(
            {
                "seconds": seconds,
                "max_pixels": limits.max_pixels,
                "transform": asdict(transform),
                "file": {name: value for name, value in asdict(file).items() if name != "data"},
            }
        ).encode()
        with self._ended_after(_WALL_SECONDS):
            self._write(REQUEST.pack(len(header), len(file.data)) + header)
            self._write(file.data)
            width, height = ANSWER.unpack(self._read(ANSWER.size))
            if not width:
                error: dict[str, str] = json.loads(self._read(height))
                if error["code"] == "input_too_costly":
                    # The process is about to end by itself, and must not get another request.
                    self.end()
                raise InputError(error["code"], error["detail"])
            pixels = self._read(3 * width * height)
        return Image.frombytes("RGB", (width, height), pixels)

    def end(self) -> None:
        """Kill the process, whatever it is doing."""
        self._process.kill()
        self._wait()

    @contextlib.contextmanager
    def _ended_after(self, seconds: float) -> Iterator[None]:
        def end() -> None:
            self._late = True
            self._process.kill()

        timer = threading.Timer(seconds, end)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._input.fileno(), view) :]
        except BrokenPipeError:
            raise self._ended() from None

    def _read(self, size: int) -> bytes:
        found = bytearray()
        while len(found) < size:
            part = os.read(self._output.fileno(), size - len(found))
            if not part:
                self._process.kill()
                raise self._ended()
            found += part
        return bytes(found)

    def _ended(self) -> DecoderEnded:
        return DecoderEnded(self._wait(), self._late)

    def _wait(self) -> int:
        for pipe in (self._input, self._output):
            with contextlib.suppress(OSError):
                pipe.close()
        return self._process.wait()

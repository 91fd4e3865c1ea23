"""The child process of decoder.py: decodes images within limits until its input ends."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import IO

from models.preprocess.decoder_child import ANSWER, READY, REQUEST
from models.preprocess.image import ImagePreprocessor
from models.preprocess.image_file.facts import ImageFile
from models.preprocess.limits import InputError, InputLimits
from models.priority import DECODER_NICENESS
from models.spec import ImageTransform

_PAGE_BYTES = resource.getpagesize()


def main() -> None:
    """Answer requests until standard input ends, which also happens when the parent is killed."""
    os.nice(max(0, DECODER_NICENESS - os.nice(0)))
    # Ctrl-C in a terminal reaches every process, but the parent decides when this one ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Libraries print about damaged images, which must reach neither the answers nor the log.
    answers = os.fdopen(os.dup(1), "wb")
    sys.stderr = os.fdopen(os.dup(2), "w")
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    _bound_memory(int(sys.argv[1]))
    answers.write(READY)
    answers.flush()
    # The parent may end while an image is decoded.
    with contextlib.suppress(BrokenPipeError):
        while _answer(sys.stdin.buffer, answers):
            pass


def _bound_memory(most: int) -> None:
    """Limit the memory to `most` bytes more than after the imports."""
    with contextlib.suppress(OSError, ValueError):
        now = int(Path("/proc/self/statm").read_text().split()[0]) * _PAGE_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (now + most, now + most))


def _answer(requests: IO[bytes], answers: IO[bytes]) -> bool:
    """Answer the next request; return False if there is none, or if this process must end after it."""
    sizes = requests.read(REQUEST.size)
    if len(sizes) < REQUEST.size:
        return False
    header_size, size = REQUEST.unpack(sizes)
    header = json.loads(requests.read(header_size))
    file = ImageFile(**header["file"] | {"data": requests.read(size)})
    transform = ImageTransform(**header["transform"])
    go_on = True
    # The timer counts the CPU time of all threads. No decoder can keep the process from ending when it fires.
    signal.setitimer(signal.ITIMER_PROF, header["seconds"])
    try:
        # The parent has already checked the file against its other limits.
        limits = InputLimits(max_pixels=header["max_pixels"])
        square = ImagePreprocessor(transform, limits).square(file)
        answer = ANSWER.pack(*square.size) + square.tobytes()
    except InputError as error:
        answer = _refused(error.code, error.detail)
    except MemoryError:
        # Libraries may be in an inconsistent state after running out of memory.
        go_on = False
        answer = _refused("input_too_costly", "Decoding the image takes too much memory. Send it smaller.")
    signal.setitimer(signal.ITIMER_PROF, 0.0)
    answers.write(answer)
    answers.flush()
    return go_on


def _refused(code: str, detail: str) -> bytes:
    error = json.dumps({"code": code, "detail": detail}).encode()
    return ANSWER.pack(0, len(error)) + error


if __name__ == "__main__":
    main()

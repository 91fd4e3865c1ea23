"""The process behind decoder.py: decodes what it is sent, within limits, until its input ends."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import IO

from models.preprocess.decoder import ANSWER, READY, REQUEST
from models.preprocess.image_file import ImageFile
from models.preprocess.limits import InputError, InputLimits
from models.preprocess.preprocessor import ImagePreprocessor
from models.priority import DECODER_NICENESS
from models.spec import ImageTransform

_PAGE_BYTES = resource.getpagesize()


def main() -> None:
    """Ends when its input does, which is also when its parent is killed."""
    os.nice(max(0, DECODER_NICENESS - os.nice(0)))
    # Ctrl-C in a terminal reaches every process: the parent decides when this one ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Libraries print what they find in a damaged image: not among the answers, and not into the log.
    answers = os.fdopen(os.dup(1), "wb")
    sys.stderr = os.fdopen(os.dup(2), "w")
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    _bound_memory(int(sys.argv[1]))
    answers.write(READY)
    answers.flush()
    # Its parent may end while it decodes.
    with contextlib.suppress(BrokenPipeError):
        while _answer(sys.stdin.buffer, answers):
            pass


def _bound_memory(most: int) -> None:
    """Allows so many bytes beyond what is there after the imports."""
    with contextlib.suppress(OSError, ValueError):
        now = int(Path("/proc/self/statm").read_text().split()[0]) * _PAGE_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (now + most, now + most))


def _answer(requests: IO[bytes], answers: IO[bytes]) -> bool:
    """Answers the next request; False where there is none, or no more are to come after this one."""
    sizes = requests.read(REQUEST.size)
    if len(sizes) < REQUEST.size:
        return False
    header_size, size = REQUEST.unpack(sizes)
    header = json.loads(requests.read(header_size))
    file = ImageFile(**header["file"] | {"data": requests.read(size)})
    transform = ImageTransform(**header["transform"])
    go_on = True
    # Of this process and its threads together: nothing that a decoder does keeps it from ending then.
    signal.setitimer(signal.ITIMER_PROF, header["seconds"])
    try:
        # Of the parent's limits those are left that the file was not checked for before.
        limits = InputLimits(max_pixels=header["max_pixels"])
        square = ImagePreprocessor(transform, limits).square(file)
        answer = ANSWER.pack(*square.size) + square.tobytes()
    except InputError as error:
        answer = _refused(error.code, error.detail)
    except MemoryError:
        # What a library leaves behind when its memory ends is not trusted.
        go_on = False
        answer = _refused("input_too_costly", "Decoding the image takes too much memory; send it smaller.")
    signal.setitimer(signal.ITIMER_PROF, 0.0)
    answers.write(answer)
    answers.flush()
    return go_on


def _refused(code: str, detail: str) -> bytes:
    error = json.dumps({"code": code, "detail": detail}).encode()
    return ANSWER.pack(0, len(error)) + error


if __name__ == "__main__":
    main()

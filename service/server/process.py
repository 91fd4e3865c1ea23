"""How the service says that it is up, and why it cannot be."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import re
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from pydantic import ValidationError
from pydantic_settings import SettingsError

from adapters.registry.records import RegistryUnavailable

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8

_TRIM_SECONDS = 10.0

STUCK = 70
"""The exit status of a process that is stuck and cannot help itself: EX_SOFTWARE of sysexits.h."""
# For a line of the log, which may be stuck too.
_LAST_WORD_SECONDS = 1.0
# More than anybody uses; some systems allow a billion, and libraries walk through all of them.
_MOST_DESCRIPTORS = 1 << 20


def explain(error: Exception) -> str:
    """One line that says what is wrong and, for a setting, which variable it is."""
    if isinstance(error, SettingsError):
        found = re.search(r'field "(\w+)"', str(error))
        return f"TOPWORK_{found[1].upper() if found else '…'}: this is no JSON"
    if isinstance(error, RegistryUnavailable) and (cause := getattr(error.__cause__, "orig", None)):
        # Where the database is, and what is the matter there, is the operator's to know.
        return " ".join(f"{error} ({cause})".split())
    if isinstance(error, ValidationError):
        return "; ".join(
            f"TOPWORK_{str(item['loc'][0]).upper() if item['loc'] else ''}: {item['msg']}"
            for item in error.errors()
        )
    return " ".join(str(error).split()) or type(error).__name__


def expected(error: Exception) -> bool:
    """Whether the message alone tells an operator what to do: our own errors, settings, files, addresses."""
    return hasattr(error, "code") or isinstance(error, ValidationError | SettingsError | OSError)


def complain(error: Exception) -> None:
    """Writes one line that says why the service cannot start; with the traceback where that is news."""
    if not expected(error):
        traceback.print_exception(error)
    print(f"topwork: {explain(error)}", file=sys.stderr, flush=True)


def give_up(error: Exception, *, supervised: bool) -> NoReturn:
    """Complains, and ends the process with status 1."""
    complain(error)
    if supervised:
        # BentoML's supervisor would start a worker again that cannot start, for ever, and then exit with 0.
        os.kill(os.getppid(), signal.SIGUSR1)
    os._exit(1)


def end_stuck(why: str) -> NoReturn:
    """Ends the process with STUCK and one line of the log, for its supervisor to start another one."""

    def say() -> None:
        logging.getLogger("topwork").critical("the process ends with status %d: %s", STUCK, why)

    word = threading.Thread(target=say, daemon=True)
    word.start()
    word.join(_LAST_WORD_SECONDS)
    os._exit(STUCK)


def end_within(seconds: float) -> None:
    """Has the process end by then, however much of it is stuck. Does not wait."""

    def wait() -> None:
        time.sleep(seconds)
        end_stuck(f"it has not ended within {seconds:g} s of being told to")

    threading.Thread(target=wait, daemon=True).start()


def raise_descriptor_limit() -> int:
    """Files and connections that this process may have open, after it has allowed itself all that it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MOST_DESCRIPTORS)
    if soft == resource.RLIM_INFINITY or soft >= most:
        return most
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return most


def give_back_memory() -> None:
    """Makes glibc return freed blocks of 8 MB and more to the system, and use two heaps for all threads.

    By default it learns to keep blocks of up to 32 MB, in a heap for each of many threads: after one
    request with huge images the process would hold hundreds of megabytes for ever. Smaller blocks are worth
    keeping: at 1 MB the network's own buffers would be mapped afresh in every run. Elsewhere than on glibc
    it does nothing.
    """
    adjust = getattr(ctypes.CDLL(None), "mallopt", None)
    if adjust is not None:
        adjust(_M_MMAP_THRESHOLD, 8 << 20)
        adjust(_M_TRIM_THRESHOLD, 32 << 20)
        adjust(_M_ARENA_MAX, 2)


def trim_memory(closing: threading.Event) -> None:
    """Gives back, every ten seconds, what the heap keeps between blocks in use: the memory of a long queue,
    else kept for ever. It takes a millisecond, seven after a burst, for which the heap is locked. Returns
    when closing.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    while trim is not None and not closing.wait(_TRIM_SECONDS):
        trim(0)


def configure_logging() -> None:
    """Our own loggers to standard error, one line each; BentoML's and uvicorn's are left to BentoML."""
    # Where, by which thread and by which process a line was logged is half of its cost, and not shown.
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    stream = logging.StreamHandler()
    stream.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logger = logging.getLogger("topwork")
    logger.handlers = [stream]
    logger.setLevel(logging.INFO)
    logger.propagate = False


@contextmanager
def told_to_end(tell: Callable[[], None]) -> Iterator[None]:
    """Calls `tell` in this event loop as soon as the process is told to end.

    The server tells the application only once it has drained. Its own handling of the signals goes on; where
    nobody handles them, nothing is done.
    """
    loop = asyncio.get_running_loop()
    ours: dict[signal.Signals, Hearing] = {}
    before = {sign: signal.getsignal(sign) for sign in (signal.SIGTERM, signal.SIGINT)}
    if threading.current_thread() is threading.main_thread():
        for sign, known in before.items():
            if callable(known):
                ours[sign] = _after(loop, tell, known)
                signal.signal(sign, ours[sign])
    try:
        yield
    finally:
        for sign, own in ours.items():
            if signal.getsignal(sign) is own:
                signal.signal(sign, before[sign])


Hearing = Callable[[int, FrameType | None], object]
"""What is called with a signal."""


def _after(loop: asyncio.AbstractEventLoop, tell: Callable[[], None], known: Hearing) -> Hearing:
    def heard(number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(tell)
        known(number, frame)

    return heard

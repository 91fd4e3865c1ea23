"""The process: start-up errors, exit statuses, limits, memory and signals."""

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

from adapters.registry.errors import RegistryUnavailable

SignalHandler = Callable[[int, FrameType | None], object]

# Parameters of mallopt, from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_TRIM_SECONDS = 10.0
STUCK = 70
"""Exit status of a process that is stuck and cannot recover: EX_SOFTWARE of sysexits.h."""
# Time to write the last log line, since logging may be stuck too.
_LAST_WORD_SECONDS = 1.0
# More than any service uses. Some systems allow a billion, and libraries iterate over all of them.
_MOST_DESCRIPTORS = 1 << 20


def explain(error: Exception) -> str:
    """Return one line that says what is wrong and, for a setting, in which variable."""
    if isinstance(error, SettingsError):
        found = re.search(r'field "(\w+)"', str(error))
        return f"TOPWORK_{found[1].upper() if found else '…'}: this is no JSON"
    if isinstance(error, RegistryUnavailable) and (cause := getattr(error.__cause__, "orig", None)):
        # The operator may see the database's address and error message.
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
    """Print one line that says why the service cannot start, and the traceback if the error is unexpected."""
    if not expected(error):
        traceback.print_exception(error)
    print(f"topwork: {explain(error)}", file=sys.stderr, flush=True)


def give_up(error: Exception, *, supervised: bool) -> NoReturn:
    """Print why the service cannot start, and exit with status 1."""
    complain(error)
    if supervised:
        # BentoML's supervisor would otherwise restart the worker for ever, and then exit with 0.
        os.kill(os.getppid(), signal.SIGUSR1)
    os._exit(1)


def end_stuck(why: str) -> NoReturn:
    """Log one line and exit with status STUCK, so that the supervisor starts another process."""

    def say() -> None:
        logging.getLogger("topwork").critical("the process ends with status %d: %s", STUCK, why)

    word = threading.Thread(target=say, daemon=True)
    word.start()
    word.join(_LAST_WORD_SECONDS)
    os._exit(STUCK)


def end_within(seconds: float) -> None:
    """Force the process to exit after this time, even if parts of it are stuck. Returns at once."""

    def wait() -> None:
        time.sleep(seconds)
        end_stuck(f"it has not ended within {seconds:g} s of being told to")

    threading.Thread(target=wait, daemon=True).start()


def raise_descriptor_limit() -> int:
    """Raise the limit of open files and connections as far as allowed, and return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MOST_DESCRIPTORS)
    if soft == resource.RLIM_INFINITY or soft >= most:
        return most
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return most


def give_back_memory() -> None:
    """Make glibc return freed blocks of 8 MB and more to the system, and use two arenas for all threads.

    By default glibc adapts to keep blocks of up to 32 MB, in one arena for each of many threads: after one
    request with huge images the process would hold hundreds of megabytes for ever. Smaller blocks are worth
    keeping: at 1 MB the network's own buffers would be mapped again in every run. Does nothing without glibc.
    """
    adjust = getattr(ctypes.CDLL(None), "mallopt", None)
    if adjust is not None:
        adjust(_M_MMAP_THRESHOLD, 8 << 20)
        adjust(_M_TRIM_THRESHOLD, 32 << 20)
        adjust(_M_ARENA_MAX, 2)


def trim_memory(closing: threading.Event) -> None:
    """Return free heap memory to the system every ten seconds, until `closing` is set.

    The memory of a long queue, between blocks in use, would otherwise be kept for ever. A call locks the heap
    for 1 ms, or 7 ms after a burst.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    while trim is not None and not closing.wait(_TRIM_SECONDS):
        trim(0)


@contextmanager
def told_to_end(tell: Callable[[], None]) -> Iterator[None]:
    """Call `tell` in this event loop as soon as the process is told to end, by SIGTERM or SIGINT.

    The server tells the application only after draining. Existing signal handlers still run; a signal without
    a handler is left as it is.
    """
    loop = asyncio.get_running_loop()
    ours: dict[signal.Signals, SignalHandler] = {}
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


def _after(loop: asyncio.AbstractEventLoop, tell: Callable[[], None], known: SignalHandler) -> SignalHandler:
    def heard(number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(tell)
        known(number, frame)

    return heard

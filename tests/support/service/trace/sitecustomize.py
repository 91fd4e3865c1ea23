"""Records which of our functions a process runs, and when.

Python imports this module at its start if this folder is on PYTHONPATH, in child processes as well.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from types import FrameType
from typing import Any

_ROOT = os.environ["TOPWORK_TEST_ROOT"] + os.sep
_PACKAGES = tuple(_ROOT + package + os.sep for package in ("models", "adapters", "service"))
_FILE = os.open(
    f"{os.environ['TOPWORK_TEST_TRACES']}/{os.getpid()}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600
)
_recorded: dict[tuple[str, str], int] = {}


def _record(frame: FrameType, event: str, _: Any) -> None:
    """Write the time, the module and the function of a call, and of a coroutine that goes on."""
    code = frame.f_code
    if event != "call" or not code.co_filename.startswith(_PACKAGES):
        return
    # All processes share this clock. Once a millisecond is enough for each function.
    now, called = int(time.monotonic() * 1e3), (code.co_filename, code.co_qualname)
    if _recorded.get(called) != now:
        _recorded[called] = now
        os.write(_FILE, f"{now} {code.co_filename[len(_ROOT) : -3]} {code.co_qualname}\n".encode())


threading.setprofile(_record)
sys.setprofile(_record)

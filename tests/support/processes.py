"""Stopping a child process of the test."""

from __future__ import annotations

import os
import signal


def stop(pid: int) -> None:
    """Stop a child of this process, and return once each of its threads has stopped.

    The signal goes to one thread. On a busy machine the others run on until that one gets a core.
    """
    os.kill(pid, signal.SIGSTOP)
    os.waitpid(pid, os.WUNTRACED)

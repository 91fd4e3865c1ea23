"""`python -m adapters.processes.fit_server`: fits what it is sent, until its input ends."""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapters.probe.fit import Dataset, OneLabel, ProbeConfig, TooCostly, fit
from adapters.probe.label_names import LabelNames
from adapters.processes.frames import Frame, read_frame, write_frame
from adapters.processes.heartbeat import ProgressClock, start_heartbeat
from models.arrays import Floats
from models.priority import NICENESS


def _answer(
    header: Mapping[str, Any], embeddings: Floats, said: Floats
) -> tuple[dict[str, Any], list[NDArray[Any]]]:
    """Fit as a request asks; return the header and the arrays of the answer.

    `said`: float32 (1 + named labels, dim), the centre and the directions of LabelNames.
    """
    targets = [tuple(target) if isinstance(target, list) else target for target in header["targets"]]
    dataset = Dataset(
        embeddings=embeddings,
        targets=targets,
        digests=header["digests"],
        task=header["task"],
        fingerprint=header["fingerprint"],
        groups=header["groups"],
        sampled=header["sampled"],
        names=LabelNames(
            dict(zip(header["names"], said[1:], strict=True)), said[0], header["names_transform"]
        ),
    )
    try:
        fitted = fit(dataset, ProbeConfig(**header["config"]))
    except OneLabel as error:
        return {"error": {"code": error.code, "detail": str(error)}}, []
    except TooCostly as error:
        predicted, limit = float(error.predicted_seconds), float(error.limit_seconds)
        return {"error": {"code": error.code, "predicted": predicted, "limit": limit}}, []
    except Exception as error:
        traceback.print_exc()
        return {"error": {"code": "fit_failed", "detail": repr(error)}}, []
    head = np.frombuffer(fitted.head.to_bytes(), dtype=np.uint8)
    return {"report": fitted.report}, [fitted.scores, head]


def _warm() -> None:
    """Run a small fit, so that the first tenant does not wait for code to be loaded."""
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((40, 16), dtype=np.float32)
    fit(Dataset(rows, ["a", "b"] * 20, [str(row) for row in range(40)], "classification", ""))


def main() -> None:
    """Serve fits on the standard pipes until the input closes.

    Arguments, if given: the descriptor of the pipe for heartbeats, and the niceness.
    """
    os.nice(int(sys.argv[2]) if len(sys.argv) > 2 else NICENESS)
    # The parent decides when this process ends. Ctrl-C in a terminal reaches every process, and BentoML's
    # supervisor terminates all of them at once.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    headway = ProgressClock()
    if len(sys.argv) > 1:
        start_heartbeat(int(sys.argv[1]), headway.made)
    requests: queue.SimpleQueue[Frame] = queue.SimpleQueue()
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    # Printed text goes to standard error, since it must not get between the frames.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def read() -> None:
        while (frame := read_frame(sys.stdin.buffer)) is not None:
            requests.put(frame)
        # A running fit is cut off, since the parent that wants its result has gone.
        os._exit(0)

    try:
        _warm()
        write_frame(answers, {"ready": True}, [])
        threading.Thread(target=read, daemon=True).start()
        while True:
            header, (embeddings, said) = requests.get()
            headway.idle = False
            write_frame(answers, *_answer(header, embeddings, said))
            headway.idle = True
    except BrokenPipeError:
        # The parent has gone. A normal exit would flush the pipe and raise again.
        os._exit(0)


if __name__ == "__main__":
    main()

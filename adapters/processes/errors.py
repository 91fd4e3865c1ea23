"""Errors of fits."""

from __future__ import annotations


class FitterUnavailable(RuntimeError):
    """The fitting process died twice on one request or cannot start, or the fitter is closed."""

    code = "fitter_unavailable"


class FitterOverloaded(RuntimeError):
    """The tenant has too many fits waiting."""

    code = "overloaded"

    def __init__(self, retry_after: float) -> None:
        super().__init__("Too many of your fits are waiting; try again later.")
        self.retry_after = retry_after


class FitFailed(RuntimeError):
    """The fit raised an unexpected error; the process's standard error has the traceback."""

    code = "fit_failed"

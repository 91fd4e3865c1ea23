"""Errors of fits."""

from __future__ import annotations

from models.errors import InternalFailure, Overloaded, Unavailable


class FitterUnavailable(Unavailable):
    """The fitting process died twice on one request or cannot start, or the fitter is closed."""

    code = "fitter_unavailable"


class FitterOverloaded(Overloaded):
    """The tenant has too many fits waiting."""

    code = "overloaded"
    retry_after: float

    def __init__(self, retry_after: float) -> None:
        super().__init__("The tenant has too many fits waiting. Try again later.")
        self.retry_after = retry_after


class FitFailed(InternalFailure):
    """The fit raised an unexpected error; the process's standard error has the traceback."""

    code = "fit_failed"

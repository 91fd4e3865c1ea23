"""The kinds of errors. The HTTP layer knows only these, and gives each kind its status."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


class DomainError(Exception):
    """An error of the contract: `code` is stable, and the message says what is wrong and what to do.

    An error of no kind is for operators: it ends a start, a command or a job, and reaches no caller.
    """

    code: str
    retry_after: float | None = None
    """Seconds until another attempt can succeed."""
    errors: Sequence[Mapping[str, str]] = ()
    """The parts of the request that are at fault, each with `pointer`, `code` and `detail`."""

    @property
    def detail(self) -> str:
        """The message that a caller reads."""
        return str(self)


class CodedError(DomainError):
    """A class of errors with several codes: each error has its own."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code


class Invalid(DomainError):
    """The request, or an input in it, cannot be used as it is."""


class NotFound(DomainError):
    """The tenant has nothing of this name."""


class Conflict(DomainError):
    """The request contradicts the present state."""


class PreconditionFailed(DomainError):
    """The state is not the one that the request names as its condition."""


class TooLarge(DomainError):
    """The request needs more work than is allowed."""


class Overloaded(DomainError):
    """Too much is waiting already; nothing was begun."""


class InternalFailure(DomainError):
    """The service failed. The caller reads the code, and only the log has the message."""


class Unavailable(DomainError):
    """A part that the request needs does not answer now."""


class TimedOut(DomainError):
    """The deadline of the request passed."""


class StorageFull(DomainError):
    """No space is left to store the result."""

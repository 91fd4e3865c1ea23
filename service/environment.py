"""Variables that are no settings of Topwork: PORT, and those that configure libraries."""

from __future__ import annotations

import os

from models import SILENT


class BadPort(ValueError):
    """A value is not a port number."""

    code = "bad_port"


def bind_port() -> int:
    """Return the port to bind if the command line names none: PORT, else 3000. Raises BadPort."""
    try:
        return parse_port(os.environ.get("PORT") or "3000")
    except BadPort as error:
        raise BadPort(f"PORT: {error}") from None


def parse_port(value: str) -> int:
    """Return the port number, where 0 means a free one. Raises BadPort."""
    if not (value.isascii() and value.isdecimal() and len(value) <= 5) or int(value) > 65535:
        raise BadPort(f"{value!r} is not a port. Use a number from 1 to 65535, or 0 for a free port")
    return int(value)


def tracing_wanted() -> bool:
    """Whether an OpenTelemetry exporter is configured and not switched off."""
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    return any(name.startswith("OTEL_EXPORTER_") or name == "OTEL_TRACES_EXPORTER" for name in os.environ)


def serving_environment() -> dict[str, str]:
    """Return the variables to set before other libraries are imported, unless the operator has set them.

    They turn usage statistics off. Without an exporter they turn OpenTelemetry off: its spans would be
    created and discarded, and full collections over them stall requests for hundreds of milliseconds. They
    limit BLAS to one thread: heads are small, and spinning threads take cores from backbones.
    """
    wanted = {**SILENT, "OPENBLAS_NUM_THREADS": "1"}
    if not tracing_wanted():
        wanted["OTEL_SDK_DISABLED"] = "true"
    return wanted


def set_serving_environment() -> None:
    """Set these variables in this process, and so in its child processes."""
    for name, value in serving_environment().items():
        os.environ.setdefault(name, value)

"""The environment of child processes."""

from __future__ import annotations

import os
from pathlib import Path

_ROOT = str(Path(__file__).resolve().parents[2])


# Secrets of the service. A child process that needs one gets it on standard input.
_SECRETS = (
    "TOPWORK_ADMIN_KEY",
    "TOPWORK_CALLBACK_SECRETS",
    "TOPWORK_DATABASE_URL",
    "TOPWORK_STORE_OPTIONS",
    "PGPASSWORD",
)
# Prefixes of cloud credentials. A worker needs these to open a bucket.
_CLOUDS = ("AWS_", "AZURE_", "GOOGLE_")


def child_environment(*, clouds: bool = False) -> dict[str, str]:
    """Return this process's environment without secrets, and with our packages on PYTHONPATH.

    `clouds`: keep the cloud credentials, which are needed to open a bucket.
    """
    path = os.pathsep.join(filter(None, [_ROOT, os.environ.get("PYTHONPATH")]))
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in _SECRETS and (clouds or not name.startswith(_CLOUDS))
    }
    return {**kept, "PYTHONPATH": path}

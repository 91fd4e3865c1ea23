"""Frozen backbones, their preprocessing, and the queue in front of them."""

import os

SILENT = {
    "BENTOML_DO_NOT_TRACK": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "ORT_DISABLE_TELEMETRY": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Environment variables that turn off the telemetry of libraries."""

# Libraries read these variables on import or on first use, and this module is imported before any of our
# others. It is the only import that changes the process.
for _name, _value in SILENT.items():
    os.environ.setdefault(_name, _value)

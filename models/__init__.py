"""The frozen side: backbones, their preprocessing, and the queue in front of them."""

import os

SILENT = {"BENTOML_DO_NOT_TRACK": "true", "HF_HUB_DISABLE_TELEMETRY": "1", "ORT_DISABLE_TELEMETRY": "1"}
"""Variables that keep libraries from reporting to their makers."""

# The libraries read them when they are imported or first used, and none of our modules comes before this one.
# It is the one import that changes something in the process.
for _name, _value in SILENT.items():
    os.environ.setdefault(_name, _value)

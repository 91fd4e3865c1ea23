"""Defaults of limits that the settings share with the parts that have them.

It imports nothing: settings are read before numpy, whose threads keep the priority that they start with.
"""

ADAPTER_EXAMPLES = 100_000
ADAPTER_LABELS = 2_000
UPLOAD_EXAMPLES = 100_000
FIT_BYTES = 512 << 20
FIT_SECONDS = 30.0
REWRITTEN_BYTES = 16 << 20

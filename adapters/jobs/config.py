"""What a worker is told when it starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from adapters.logs import LogFormat

Engine = Literal["local", "ray"]
"""Where jobs run: in the worker's own process, or on the nodes of a Ray cluster."""


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """Settings of a worker. The service's settings have the defaults."""

    database: str  # URL
    store: str  # a folder or a URL
    scratch: str  # folder for the checkpoints from which another attempt resumes
    max_upload_examples: int
    max_adapter_examples: int
    max_labels: int
    max_fit_bytes: int
    max_image_bytes: int
    max_image_pixels: int
    max_text_chars: int
    store_options: Mapping[str, str]
    backbones: Sequence[str]  # entries of the settings, which say what the short names stand for
    device: str
    threads: int
    lease_seconds: float
    max_running_per_tenant: int
    log_format: LogFormat
    callback_secrets: Sequence[str] = field(repr=False)
    poll_seconds: float = 1.0
    engine: Engine = "local"
    ray_address: str = "auto"
    ray_gpus: float = 1.0  # GPUs of one attempt, which may be a fraction
    ray_spread: int = 20_000  # new inputs of an upload from which on several nodes embed them
    ray_patience: float = 300.0  # seconds that an attempt waits for resources that are not there

    @property
    def ray_resources(self) -> Mapping[str, float]:
        """What one attempt, or one actor that embeds for it, asks Ray for."""
        gpus = {"GPU": self.ray_gpus} if self.device == "cuda" else {}
        return {"CPU": float(self.threads)} | gpus

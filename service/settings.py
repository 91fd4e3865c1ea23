"""Settings: read from the environment once, at start-up, and passed down.

Nothing else reads the environment.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from adapters.supervising import WorkerConfig
from models import SILENT

MIB = 1 << 20


class Settings(BaseSettings):
    """Everything that can be set, each as the environment variable `TOPWORK_<NAME>`.

    Raises pydantic.ValidationError, which names the variable, when a value cannot be used.
    """

    model_config = SettingsConfigDict(env_prefix="TOPWORK_", frozen=True, extra="ignore")

    home: Path = Field(
        default=Path("~/.topwork"),
        description="Folder of the database and the artifacts, unless both are set elsewhere.",
    )
    database_url: str | None = Field(
        default=None,
        description="SQLAlchemy URL, e.g. postgresql+psycopg://…; default: SQLite in the home folder.",
    )
    store_url: str | None = Field(
        default=None,
        description="Folder or bucket (s3://bucket/prefix); default: `artifacts` in the home folder.",
    )
    store_options: dict[str, str] = Field(
        default_factory=dict,
        repr=False,
        description="JSON of obstore's options for a bucket; default: the cloud's own chain.",
    )
    admin_key: SecretStr | None = Field(
        default=None,
        description="Bearer key asked of every caller. Required as soon as the address is not loopback.",
    )

    backbones: Annotated[tuple[str, ...], NoDecode] = Field(
        default=("efficientnet-lite0", "minilm-l6-v2"),
        description="Comma-separated names, timm:<name or path> or sentence-transformers:<name or path>.",
    )
    device: Literal["cpu", "cuda"] = Field(
        default="cpu", description="Where backbones run. With cuda and no GPU the service does not start."
    )
    threads: int = Field(
        default=0, ge=0, le=256, description="Threads of one backbone run; 0: as many as usable cores."
    )

    max_body_bytes: int = Field(default=64 * MIB, gt=0, description="Bytes of one request body.")
    max_bodies_bytes: int = Field(
        default=512 * MIB, gt=0, description="Bytes of all bodies being worked on; beyond it, 429."
    )
    max_upload_bytes: int = Field(
        default=1_024 * MIB, gt=0, description="Bytes of one bulk upload (NDJSON, CSV or zip)."
    )
    max_upload_examples: int = Field(default=100_000, gt=0, description="Examples in one bulk upload.")
    max_examples: int = Field(default=1_000, gt=0, description="Examples in one /adapt request.")
    max_inputs: int = Field(default=128, gt=0, description="Inputs in one /predict or /embed request.")
    max_adapter_examples: int = Field(default=100_000, gt=0, description="Examples kept by one adapter.")
    max_labels: int = Field(default=2_000, gt=1, description="Labels of one adapter.")
    max_image_bytes: int = Field(default=16 * MIB, gt=0, description="Bytes of one encoded image.")
    max_image_pixels: int = Field(
        default=50_000_000, gt=0, description="Pixels of one image, read before decoding."
    )
    max_text_chars: int = Field(default=100_000, gt=0, description="Characters of one text.")

    max_queue: int = Field(
        default=4_096, gt=0, description="Inputs waiting for one backbone; beyond it, 429."
    )
    max_wait: float = Field(
        default=2.0,
        gt=0,
        description="Seconds that a prediction may expect to wait for its backbone; beyond it, 429.",
    )
    max_fit_queue: int = Field(default=32, gt=0, description="Fits waiting for the fitter; beyond it, 429.")
    max_fit_seconds: float = Field(
        default=30.0, gt=0, description="A fit predicted to take longer is refused."
    )
    max_fit_bytes: int = Field(default=512 * MIB, gt=0, description="Memory of the blocks of one fit.")
    workers: int = Field(
        default=1, ge=0, le=8, description="Processes that do jobs; 0: others do, elsewhere."
    )
    worker_threads: int = Field(default=1, ge=1, le=256, description="Threads of one worker.")
    lease_seconds: float = Field(
        default=30.0,
        ge=3,
        le=3_600,
        description="Seconds without a sign of its worker after which a job goes to another one.",
    )
    max_running_per_tenant: int = Field(
        default=1, gt=0, description="Jobs of one tenant that run at the same time."
    )
    max_jobs: int = Field(default=10, gt=0, description="Jobs that a tenant may have queued and running.")
    max_job_seconds: float = Field(
        default=86_400.0, gt=0, description="Seconds from a job's submission until it fails."
    )
    callback_urls: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="Comma-separated URLs that jobs may call back; one that ends in / allows all below it.",
    )
    network_cache_bytes: int = Field(
        default=512 * MIB, gt=0, description="Loaded networks of fine-tuned versions kept in memory."
    )
    head_cache_bytes: int = Field(default=64 * MIB, gt=0, description="Loaded heads kept in memory.")
    request_timeout: float = Field(
        default=120.0, gt=0, description="Seconds that a request may take; beyond it, 504."
    )
    drain_timeout: int = Field(
        default=20, gt=0, le=25, description="Seconds that running requests get to finish at shutdown."
    )
    access_log: bool = Field(default=True, description="Log one line for each request.")

    @field_validator("home", mode="after")
    @classmethod
    def _absolute(cls, home: Path) -> Path:
        return home.expanduser().absolute()

    @field_validator("backbones", "callback_urls", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return (
            tuple(part.strip() for part in value.split(",") if part.strip())
            if isinstance(value, str)
            else value
        )

    @field_validator("backbones", mode="after")
    @classmethod
    def _some_once(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if not names or len(set(names)) != len(names):
            raise ValueError("name at least one backbone, each once")
        return names

    @field_validator("admin_key", mode="after")
    @classmethod
    def _hard_to_guess(cls, key: SecretStr | None) -> SecretStr | None:
        if key is None:
            return None
        if not key.get_secret_value():
            return None
        if len(key.get_secret_value()) < 16 or not key.get_secret_value().isascii():
            raise ValueError("use at least 16 ASCII characters, e.g. of `openssl rand -hex 32`")
        return key

    @property
    def database(self) -> str:
        """SQLAlchemy URL of the registry."""
        return self.database_url or f"sqlite:///{self.home / 'topwork.db'}"

    @property
    def store(self) -> str:
        """Folder or bucket URL of the artifacts."""
        return self.store_url or str(self.home / "artifacts")

    @property
    def worker(self) -> WorkerConfig:
        """What a worker of this service's jobs needs."""
        return WorkerConfig(
            database=self.database,
            store=self.store,
            scratch=str(self.home / "jobs"),
            store_options=self.store_options,
            device=self.device,
            threads=self.worker_threads,
            lease_seconds=self.lease_seconds,
            max_running_per_tenant=self.max_running_per_tenant,
            max_upload_examples=self.max_upload_examples,
            max_adapter_examples=self.max_adapter_examples,
            max_labels=self.max_labels,
            max_fit_bytes=self.max_fit_bytes,
            max_image_bytes=self.max_image_bytes,
            max_image_pixels=self.max_image_pixels,
            max_text_chars=self.max_text_chars,
        )

    @property
    def usable_threads(self) -> int:
        """Threads of one backbone run: as set, else the cores this process may run on."""
        return self.threads or len(os.sched_getaffinity(0))


class BadPort(ValueError):
    """What should be a port is none."""

    code = "bad_port"


def bind_port() -> int:
    """The port to bind unless the command line says another: PORT, else 3000. Raises BadPort."""
    try:
        return parse_port(os.environ.get("PORT") or "3000")
    except BadPort as error:
        raise BadPort(f"PORT: {error}") from None


def parse_port(value: str) -> int:
    """The number of a port, 0 for a free one. Raises BadPort."""
    if not (value.isascii() and value.isdecimal() and len(value) <= 5) or int(value) > 65535:
        raise BadPort(f"{value!r} is not a port; use a number from 1 to 65535, or 0 for a free one")
    return int(value)


def tracing_wanted() -> bool:
    """Whether an OpenTelemetry exporter is configured and not switched off."""
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    return any(name.startswith("OTEL_EXPORTER_") or name == "OTEL_TRACES_EXPORTER" for name in os.environ)


def serving_environment() -> dict[str, str]:
    """Variables of other libraries that should be set before they are imported, unless the operator has set
    them.

    No library reports to its maker. Without an exporter OpenTelemetry's spans are made and thrown away, and
    full collections over them stall requests for hundreds of milliseconds. One BLAS thread: heads are small,
    and spinning threads take cores from backbones.
    """
    wanted = {**SILENT, "OPENBLAS_NUM_THREADS": "1"}
    if not tracing_wanted():
        wanted["OTEL_SDK_DISABLED"] = "true"
    return wanted


def set_serving_environment() -> None:
    """Sets them in this process, and so in those that it starts."""
    for name, value in serving_environment().items():
        os.environ.setdefault(name, value)

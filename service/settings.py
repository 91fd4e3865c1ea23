"""Settings, read from the environment once at start-up and passed down.

Nothing else reads the environment.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from adapters import defaults
from adapters.jobs.callbacks import secret_key
from adapters.jobs.config import Engine, WorkerConfig
from adapters.logs import LogFormat
from models.preprocess.limits import InputLimits
from models.sources.source import parse_sources
from models.spec import UnknownBackbone
from service.environment import set_serving_environment

logger = logging.getLogger("topwork")

MIB = 1 << 20
_MOST = 2**31 - 1
# The upper bounds exceed any real machine: a larger value is a typing error.
Count = Annotated[int, Field(gt=0, le=_MOST)]
Bytes = Annotated[int, Field(gt=0, le=1 << 44)]
Seconds = Annotated[float, Field(gt=0, le=366 * 86_400.0)]

_INPUTS = InputLimits()

_PREFIX = "TOPWORK_"
# Variables of the tests and the benchmarks.
_OF_TOOLS = re.compile(r"TOPWORK_(TEST_\w+|DATA|URL|FAILING)")
# Variables that Kubernetes and Docker set for services with such a name.
_OF_LINKS = re.compile(
    r"TOPWORK_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_PROTO|_PORT|_ADDR)?)"
)
_LINK = re.compile(r"(tcp|udp|sctp)://")
# Similarity of names, 0 to 1, from which a variable is rejected as a misspelt setting, and from which a
# warning suggests the setting.
_SLIP = 0.85
_ALIKE = 0.6


class UnknownSetting(RuntimeError):
    """A variable has the misspelt name of a setting, so its value would be ignored."""

    code = "unknown_setting"


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
        description="Comma-separated packaged names and sources such as timm:<name or folder>, with a "
        "short name if you like (mine=timm:…); see the guide on bringing a backbone.",
    )
    device: Literal["cpu", "cuda"] = Field(
        default="cpu", description="Where backbones run. With cuda and no GPU the service does not start."
    )
    threads: int = Field(
        default=0, ge=0, le=256, description="Threads of one backbone run; 0: as many as usable cores."
    )

    max_body_bytes: Bytes = Field(default=64 * MIB, description="Bytes of one request body.")
    max_bodies_bytes: Bytes = Field(
        default=512 * MIB,
        description="Bytes of all bodies being worked on; beyond it, 429.",
    )
    max_upload_bytes: Bytes = Field(
        default=1_024 * MIB,
        description="Bytes of one bulk upload (NDJSON, CSV or zip).",
    )
    max_upload_examples: Count = Field(
        default=defaults.UPLOAD_EXAMPLES, description="Examples in one bulk upload."
    )
    max_examples: Count = Field(default=1_000, description="Examples in one /adapt request.")
    max_inputs: Count = Field(default=128, description="Inputs in one /predict or /embed request.")
    max_openai_inputs: Count = Field(default=2_048, description="Texts in one /v1/embeddings request.")
    max_adapter_examples: Count = Field(
        default=defaults.ADAPTER_EXAMPLES, description="Examples kept by one adapter."
    )
    max_labels: int = Field(
        default=defaults.ADAPTER_LABELS, gt=1, le=_MOST, description="Labels of one adapter."
    )
    max_image_bytes: Bytes = Field(default=_INPUTS.max_image_bytes, description="Bytes of one encoded image.")
    max_image_pixels: Count = Field(
        default=_INPUTS.max_pixels, description="Pixels of one image, read before decoding."
    )
    max_text_chars: Count = Field(default=_INPUTS.max_text_chars, description="Characters of one text.")

    max_queue: Count = Field(default=4_096, description="Inputs waiting for one backbone; beyond it, 429.")
    max_wait: Seconds = Field(
        default=2.0,
        description="Seconds that a prediction may expect to wait for its backbone; beyond it, 429.",
    )
    max_fit_queue: Count = Field(
        default=32, description="Fits of a tenant that is alone; beyond it, or its share, 429."
    )
    max_fit_seconds: Seconds = Field(
        default=defaults.FIT_SECONDS, description="A fit predicted to take longer is refused."
    )
    max_fit_bytes: Bytes = Field(default=defaults.FIT_BYTES, description="Memory of the blocks of one fit.")
    workers: int = Field(
        default=1, ge=0, le=8, description="Processes that do jobs; 0: others do, elsewhere."
    )
    worker_threads: int = Field(default=1, ge=1, le=256, description="Threads of one worker.")
    engine: Engine = Field(
        default="local", description="Where jobs run: local, in the workers; ray, on a Ray cluster."
    )
    ray_address: str = Field(
        default="auto",
        description="Address of the Ray cluster, host:port; auto: RAY_ADDRESS, or this machine's.",
    )
    ray_gpus: float = Field(
        default=1.0,
        gt=0,
        le=16,
        description="GPUs of a job on Ray if the device is cuda; 0.5: two share one.",
    )
    ray_spread: Count = Field(
        default=20_000,
        description="New inputs of one upload from which on several nodes of the cluster embed them.",
    )
    ray_patience: Seconds = Field(
        default=300.0, description="Seconds that a job waits for resources that no node of the cluster has."
    )
    lease_seconds: float = Field(
        default=30.0,
        ge=3,
        le=3_600,
        description="Seconds without a sign of its worker after which a job goes to another one.",
    )
    max_running_per_tenant: Count = Field(
        default=1, description="Jobs of one tenant that run at the same time."
    )
    max_jobs: Count = Field(default=10, description="Jobs that a tenant may have queued and running.")
    max_job_seconds: Seconds = Field(
        default=86_400.0, description="Seconds from a job's submission until it fails."
    )
    callback_urls: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="Comma-separated URLs that jobs may call back; one that ends in / allows all below it.",
    )
    callback_secrets: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        default=(),
        description="Comma-separated secrets (whsec_…), each of which signs callbacks; default: unsigned.",
    )
    network_cache_bytes: Bytes = Field(
        default=512 * MIB,
        description="Loaded networks of fine-tuned versions kept in memory.",
    )
    head_cache_bytes: Bytes = Field(default=64 * MIB, description="Loaded heads kept in memory.")
    rewrite_bytes: Bytes = Field(
        default=defaults.REWRITTEN_BYTES,
        description="Largest PostgreSQL table, with its indexes, to rewrite after an erasure; readers wait.",
    )
    request_timeout: Seconds = Field(
        default=120.0, description="Seconds that a request may take; beyond it, 504."
    )
    drain_timeout: int = Field(
        default=20, gt=0, le=25, description="Seconds that running requests get to finish at shutdown."
    )
    access_log: bool = Field(default=True, description="Log one line for each request.")
    log_format: LogFormat = Field(
        default="auto",
        description="Log lines as json, or as columns (console); auto: console on a terminal, else json.",
    )

    @model_validator(mode="before")
    @classmethod
    def _without_slips(cls, value: Any) -> Any:
        for name, setting in unknown_settings(os.environ).items():
            if setting is not None and _likeness(name, setting) >= _SLIP:
                raise UnknownSetting(
                    f"{name} is not a setting. Did you mean {setting}? Correct it or unset it."
                )
        return value

    @field_validator("home", mode="after")
    @classmethod
    def _absolute(cls, home: Path) -> Path:
        return home.expanduser().absolute()

    @field_validator("backbones", "callback_urls", "callback_secrets", mode="before")
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
        try:
            parse_sources(names)
        except UnknownBackbone as error:
            raise ValueError(str(error)) from error
        return names

    @field_validator("callback_secrets", mode="after")
    @classmethod
    def _keys(cls, secrets: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        for secret in secrets:
            secret_key(secret.get_secret_value())
        return secrets

    @field_validator("admin_key", mode="after")
    @classmethod
    def _hard_to_guess(cls, key: SecretStr | None) -> SecretStr | None:
        secret = "" if key is None else key.get_secret_value()
        if not secret:
            return None
        if len(secret) < 16 or not (secret.isascii() and secret.isprintable()):
            raise ValueError("use at least 16 printable ASCII characters, e.g. of `openssl rand -hex 32`")
        if secret != secret.strip():
            raise ValueError("remove the spaces around it: a header cannot have them")
        return key

    @field_validator("engine", mode="after")
    @classmethod
    def _guarded(cls, engine: Engine) -> Engine:
        token = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
        if engine == "ray" and not (os.environ.get("RAY_AUTH_MODE") == "token" and token):
            raise ValueError(
                "whoever reaches a Ray cluster that asks for no token can run code on it. Set "
                "RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, here and on all nodes"
            )
        return engine

    def make_home(self) -> None:
        """Create the home folder if the database or the store is in it. Raises HomeUnusable."""
        if self.database_url is not None and self.store_url is not None:
            return
        try:
            self.home.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise HomeUnusable(
                f"The folder {self.home} cannot be created ({error.strerror}). Set TOPWORK_HOME to "
                "another folder."
            ) from error

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
        """Configuration of the workers that run this service's jobs."""
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
            log_format=self.log_format,
            backbones=self.backbones,
            engine=self.engine,
            ray_address=self.ray_address,
            ray_gpus=self.ray_gpus,
            ray_spread=self.ray_spread,
            ray_patience=self.ray_patience,
            callback_secrets=[secret.get_secret_value() for secret in self.callback_secrets],
        )

    @property
    def input_limits(self) -> InputLimits:
        """Limits of one image and one text."""
        return InputLimits(
            max_image_bytes=self.max_image_bytes,
            max_pixels=self.max_image_pixels,
            max_text_chars=self.max_text_chars,
        )

    @property
    def usable_threads(self) -> int:
        """Threads of one backbone run: as set, else the number of cores that this process may use."""
        return self.threads or len(os.sched_getaffinity(0))


class HomeUnusable(RuntimeError):
    """The home folder cannot be created."""

    code = "home_unusable"


def unknown_settings(environment: Mapping[str, str]) -> dict[str, str | None]:
    """Return the variables with our prefix that are not settings, each with the most similar one, if any."""
    known = [_PREFIX + name.upper() for name in Settings.model_fields]
    found: dict[str, str | None] = {}
    for name, value in sorted(environment.items()):
        upper = name.upper()
        if not upper.startswith(_PREFIX) or upper in known or _OF_TOOLS.fullmatch(upper):
            continue
        if _OF_LINKS.fullmatch(upper) or (upper.endswith("_PORT") and _LINK.match(value)):
            continue
        nearest = max(known, key=lambda setting: _likeness(upper, setting))
        found[name] = nearest if _likeness(upper, nearest) >= _ALIKE else None
    return found


def _likeness(name: str, setting: str) -> float:
    """Return the similarity of two names without their prefix, 0 to 1."""
    parts = (name.upper().removeprefix(_PREFIX), setting.removeprefix(_PREFIX))
    return difflib.SequenceMatcher(None, *parts, autojunk=False).ratio()


def warn_of_unknown_settings() -> None:
    """Log a warning for each variable with our prefix that is not a setting."""
    for name, nearest in unknown_settings(os.environ).items():
        hint = f" Did you mean {nearest}?" if nearest else ""
        logger.warning("%s is no setting of this release and is ignored.%s", name, hint)


def read_settings() -> Settings:
    """Return the settings, after setting the variables that other libraries read when they are imported."""
    set_serving_environment()
    return Settings()

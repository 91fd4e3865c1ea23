"""Request bodies for tenants and keys, as the API documentation shows them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from adapters.registry.quotas import Quotas
from adapters.registry.tenants import LONGEST_LIFETIME, SHORTEST_LIFETIME, Scope
from service.payloads.schema import BIGGEST, NAME_PATTERN, Request


class TenantRequest(Request):
    """A tenant to make."""

    tenant: str = Field(pattern=NAME_PATTERN, examples=["acme"])


class KeyRequest(Request):
    """A key to make."""

    scopes: Annotated[list[Scope], Field(min_length=1, max_length=3)] = Field(
        description="predict: ask. adapt: teach, and change or see what was taught. admin: make and revoke "
        "the tenant's keys.",
        examples=[["predict"]],
    )
    note: str = Field(
        default="",
        max_length=200,
        # PostgreSQL text cannot store NUL, and a note is one line.
        pattern=r"^[^\x00-\x1f\x7f]*$",
        description="What it is for.",
        examples=["web shop"],
    )
    expires_in: int | None = Field(
        default=None,
        ge=SHORTEST_LIFETIME,
        le=LONGEST_LIFETIME,
        description="Seconds; without it the key does not expire.",
    )


class RotateRequest(Request):
    """How a key is replaced."""

    grace: int = Field(
        default=3_600, ge=0, le=30 * 86_400, description="Seconds for which the old key goes on."
    )


_Rate = Annotated[float | None, Field(gt=0, le=1e12)]
_Count = Annotated[int | None, Field(ge=0, le=BIGGEST)]
_QUOTAS = Quotas()  # the defaults of a request are those of the domain


class QuotasIn(Request):
    """What a tenant may have; null or left out where nothing is said. All of it is set at once.

    By the second: requests with its keys, their inputs and examples together, the bytes of their bodies. At
    once: adapters, examples of all of them together, jobs that run.
    """

    requests_per_second: _Rate = _QUOTAS.requests_per_second
    items_per_second: _Rate = _QUOTAS.items_per_second
    bytes_per_second: _Rate = _QUOTAS.bytes_per_second
    max_adapters: _Count = _QUOTAS.max_adapters
    max_examples: _Count = _QUOTAS.max_examples
    max_running_jobs: _Count = _QUOTAS.max_running_jobs

    def quotas(self) -> Quotas:
        """Return the quotas to set."""
        return Quotas(**self.model_dump())

"""What endpoints ask for of path, query, headers and key.

All of it is async, because FastAPI runs any other dependency in a thread, which costs 0.2 ms per request.
"""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import Depends, Header, Path, Query, Request

from adapters.examples.validation import check_id
from adapters.registry.errors import UnknownAdapter, UnknownJob, UnknownTenant
from adapters.storage.artifact import is_tenant
from service.edge.channel import channel_of
from service.payloads.pages import PageQuery, decode_cursor
from service.payloads.schema import BIGGEST, NAME_PATTERN

_NAME = re.compile(NAME_PATTERN)
_JOB = re.compile(r"[0-9a-f]{32}")


async def tenant_of(request: Request) -> str:
    """Return the tenant of the key; for the operator, the tenant in X-Tenant, or "default" without it.

    Raises a 422 Problem for an invalid name.
    """
    return channel_of(request.scope).known_tenant()


async def named_tenant(request: Request, tenant: str) -> str:
    """Return the tenant in the path.

    Raises UnknownTenant for an invalid name and for a key of another tenant, which must not learn more.
    """
    own = channel_of(request.scope).caller.tenant
    if not is_tenant(tenant) or own not in (None, tenant):
        raise UnknownTenant(tenant[:63])
    return tenant


async def adapter_name(adapter: str) -> str:
    """Return the adapter named in the path. Raises UnknownAdapter for a name that no adapter can have."""
    if _NAME.fullmatch(adapter) is None:
        raise UnknownAdapter(adapter[:63])
    return adapter


async def example_id(example: str) -> str:
    """Return the example id in the path, which may contain slashes."""
    check_id(example)
    return example


async def job_id(job: str) -> str:
    """Return the job id in the path. Raises UnknownJob for an id that no job can have."""
    if _JOB.fullmatch(job) is None:
        raise UnknownJob(job[:63])
    return job


async def jobs_adapter(adapter: str | None = None) -> str | None:
    """Return the adapter whose jobs are listed, None for all. An invalid name becomes "", which none has."""
    return adapter if adapter is None or _NAME.fullmatch(adapter) else ""


async def expected(if_match: Annotated[str | None, Header()] = None) -> str | None:
    """Return the entity tag that must still match, or None if any does: for `*`, or without the header."""
    return None if if_match is None or if_match.strip() == "*" else if_match.strip()


Adapter = Annotated[str, Depends(adapter_name)]
Example = Annotated[str, Depends(example_id)]
Expected = Annotated[str | None, Depends(expected)]
Job = Annotated[str, Depends(job_id)]
JobsAdapter = Annotated[str | None, Depends(jobs_adapter)]
NamedTenant = Annotated[str, Depends(named_tenant)]
Tenant = Annotated[str, Depends(tenant_of)]
Version = Annotated[int, Path(ge=1, le=BIGGEST)]


async def page(
    cursor: Annotated[str | None, Query(max_length=2_048)] = None,
    limit: Annotated[int, Query(ge=1, le=1_000)] = 100,
) -> PageQuery:
    """Return the page that is asked for. Raises a 422 Problem for an invalid cursor."""
    return PageQuery(None if cursor is None else decode_cursor(cursor), limit)


Page = Annotated[PageQuery, Depends(page)]

"""The endpoints of examples and feedback."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query, Request, Response

from adapters.adaptation.catalog import AdapterCatalog
from adapters.adaptation.example_editor import ExampleEditor
from service.api.dependencies import Adapter, Example, Page, Tenant
from service.api.idempotency import IdempotencyGuard, Replying
from service.errors import Problem
from service.payloads.reader import RequestReader
from service.payloads.responses.adaptation import render_removed, render_revised
from service.payloads.responses.examples import render_example, render_examples


class ExampleEndpoints:
    """What is done with the examples of an adapter, one by one or page by page."""

    def __init__(
        self, catalog: AdapterCatalog, editor: ExampleEditor, reader: RequestReader, guard: IdempotencyGuard
    ) -> None:
        self._catalog = catalog
        self._editor = editor
        self._reader = reader
        self._guard = guard

    async def list_examples(
        self,
        tenant: Tenant,
        adapter: Adapter,
        page: Page,
        excluded: bool | None = None,
    ) -> Response:
        """List the examples in the order of their ids.

        `excluded` selects those that are set aside (true), or the others (false).
        """
        found = await self._catalog.examples(tenant, adapter, page.after, page.wanted, excluded)
        return render_examples(*found, page)

    async def delete_examples(
        self,
        tenant: Tenant,
        adapter: Adapter,
        id: Annotated[list[str] | None, Query(max_length=1_000)] = None,
        all: bool = False,
    ) -> Response:
        """Erase the examples named by `id` (repeat it), or all, and the versions fitted on them. Then fit."""
        return render_removed(await self._editor.remove(tenant, adapter, to_remove(id, all)))

    async def get_example(self, tenant: Tenant, adapter: Adapter, example: Example) -> Response:
        """Return one example, with its input if inputs are kept."""
        _, record, value = await self._catalog.example(tenant, adapter, example)
        return render_example(record, value)

    async def delete_example(self, tenant: Tenant, adapter: Adapter, example: Example) -> Response:
        """Erase one example, and the versions that were fitted on it. Then fit on the others."""
        return render_removed(await self._editor.remove(tenant, adapter, [example]))

    async def amend_example(
        self, request: Request, tenant: Tenant, adapter: Adapter, example: Example
    ) -> Response:
        """Change the label or the group of an example, set it aside or take it back. Then fit."""

        async def amend(asked: Request, reply: Replying) -> Response:
            wanted = await self._reader.amendment(asked)
            done = await self._editor.amend(tenant, adapter, example, wanted, reply(render_revised))
            return render_revised(done)

        return await self._guard.answer(request, tenant, amend)

    async def send_feedback(self, request: Request, tenant: Tenant, adapter: Adapter) -> Response:
        """Say what is right for an input, or for a kept example."""

        async def correct(asked: Request, reply: Replying) -> Response:
            told = await self._reader.feedback(asked)
            return render_revised(await self._editor.feedback(tenant, adapter, told, reply(render_revised)))

        return await self._guard.answer(request, tenant, correct)


def to_remove(ids: list[str] | None, everything: bool) -> list[str] | None:
    """Return the ids to remove, None for all. Raises a 422 Problem unless exactly one of the two is given."""
    if bool(ids) == everything:
        raise Problem(422, "invalid_request", "Name the examples with `id`, or send `all=true`.")
    return ids

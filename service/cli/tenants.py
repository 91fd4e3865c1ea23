"""`topwork tenants`: works on the database directly, whether or not the service runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.cli.console import command_group, show, show_all

if TYPE_CHECKING:
    from adapters.registry.quotas import Quotas
    from adapters.registry.registry import Registry
    from service.settings import Settings

TenantName = Annotated[str, typer.Argument(help="Name of the tenant.", show_default=False)]

app = command_group("Create, list, limit and erase tenants.")


class BadArgument(ValueError):
    """A command-line argument cannot be used; the message says why."""

    code = "bad_argument"


@contextmanager
def open_registry(settings: Settings) -> Iterator[Registry]:
    """Yield the registry, which must have this release's tables."""
    from adapters.registry.registry import Registry

    registry = Registry(settings.database)
    try:
        registry.require_current()
        yield registry
    finally:
        registry.close()


@app.command()
def create(tenant: TenantName) -> None:
    """Create a tenant."""
    from service.settings import read_settings

    settings = read_settings()

    from adapters.storage.artifact import is_tenant

    with open_registry(settings) as registry:
        if not is_tenant(tenant):
            raise BadArgument("A tenant's name must be 1 to 63 of a-z, 0-9, dot, underscore and dash.")
        show(asdict(registry.tenants.create(tenant)))


@app.command("list")
def list_tenants() -> None:
    """List all tenants, one line of JSON each."""
    from service.settings import read_settings

    with open_registry(read_settings()) as registry:
        show_all(_all_tenants(registry))


@app.command("quotas")
def set_quotas(
    tenant: TenantName,
    quotas: Annotated[
        str,
        typer.Argument(
            help='All quotas as JSON, such as {"items_per_second": 50, "max_adapters": 10}. '
            "A quota that is left out is removed.",
            show_default=False,
        ),
    ],
) -> None:
    """Replace all quotas of a tenant."""
    from service.settings import read_settings

    with open_registry(read_settings()) as registry:
        show(asdict(registry.tenants.set_quotas(tenant, _quotas(quotas))))


@app.command()
def erase(tenant: TenantName) -> None:
    """Erase a tenant with all its data, and print the receipt. Running services notice within a second."""
    from service.settings import read_settings

    settings = read_settings()

    from adapters.adaptation.erasure import ErasureSweeper
    from adapters.storage.open import open_store

    with open_registry(settings) as registry:
        store = open_store(settings.store, settings.store_options)
        registry.identity.check(store)
        receipt = registry.erasures.tenant(tenant)
        # A running service may have begun with the files. The receipt is printed once they are gone.
        store.delete_tenant(tenant)
        ErasureSweeper(registry, store, settings.rewrite_bytes).clear()
        show(asdict(receipt))


def _all_tenants(registry: Registry) -> Iterator[dict[str, Any]]:
    after = None
    while page := registry.tenants.tenants(after):
        yield from map(asdict, page)
        after = page[-1].name


def _quotas(text: str) -> Quotas:
    from pydantic import ValidationError

    from service.payloads.tenants import QuotasIn

    try:
        return QuotasIn.model_validate_json(text).quotas()
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"{part}: " for part in first["loc"])
        raise BadArgument(f"The quotas are not valid: {where}{first['msg']}.") from error

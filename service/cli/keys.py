"""`topwork keys`: works on the database directly, whether or not the service runs."""

from __future__ import annotations

from dataclasses import asdict
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from service.cli.console import command_group, show, show_all
from service.cli.tenants import BadArgument, TenantName, open_registry

if TYPE_CHECKING:
    from adapters.registry.tenants import Scope

SECONDS_PER_DAY = 86_400.0

KeyId = Annotated[str, typer.Argument(help="Id of the key.", show_default=False)]

app = command_group("Create, list, rotate and revoke the API keys of a tenant.")


@app.command()
def create(
    tenant: TenantName,
    scopes: Annotated[
        str, typer.Option(help="Comma-separated list of predict, adapt and admin.")
    ] = "predict,adapt",
    note: Annotated[str, typer.Option(help="What the key is for.", show_default=False)] = "",
    days: Annotated[
        float | None, typer.Option(help="Days until the key expires. [default: it does not expire]")
    ] = None,
) -> None:
    """Create a key and print it. It is shown only once."""
    from service.settings import read_settings

    with open_registry(read_settings()) as registry:
        from adapters.registry.tenants import SHORTEST_LIFETIME

        lifetime = None if days is None else _duration(days * SECONDS_PER_DAY, SHORTEST_LIFETIME)
        print(registry.tenants.create_key(tenant, _scopes(scopes), note=note, lifetime=lifetime)[1])


@app.command("list")
def list_keys(tenant: TenantName) -> None:
    """List the keys of a tenant, one line of JSON each."""
    from service.settings import read_settings

    with open_registry(read_settings()) as registry:
        show_all(map(asdict, registry.tenants.keys(tenant)))


@app.command()
def rotate(
    tenant: TenantName,
    key: KeyId,
    grace: Annotated[float, typer.Option(help="Seconds for which the old key still works.")] = 3_600,
) -> None:
    """Replace a key by a new one, and print the new one."""
    from service.settings import read_settings

    with open_registry(read_settings()) as registry:
        print(registry.tenants.rotate(tenant, key, _duration(grace, 0.0))[1])


@app.command()
def revoke(tenant: TenantName, key: KeyId) -> None:
    """Revoke a key."""
    from service.settings import read_settings

    with open_registry(read_settings()) as registry:
        show(asdict(registry.tenants.revoke(tenant, key)))


def _duration(seconds: float, least: float) -> timedelta:
    from adapters.registry.tenants import LONGEST_LIFETIME

    if not least <= seconds <= LONGEST_LIFETIME:
        raise BadArgument(f"Use a time from {least:g} seconds to ten years.")
    return timedelta(seconds=seconds)


def _scopes(text: str) -> list[Scope]:
    from adapters.registry.tenants import Scope

    names = {name.strip() for name in text.split(",")}
    found: list[Scope] = [scope for scope in get_args(Scope) if scope in names]
    if len(found) != len(names):
        raise BadArgument(f"Unknown scopes in {text!r}; choose from {','.join(get_args(Scope))}.")
    return found

"""`topwork tenants` and `topwork keys`: straight on the database, whether or not the service runs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import asdict
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, get_args

if TYPE_CHECKING:
    from adapters.registry.erasures import Receipt
    from adapters.registry.registry import Registry
    from adapters.registry.tenants import KeyRecord, Quotas, Scope, TenantRecord
    from service.settings import Settings


_DAY = 86_400.0
_LONGEST = 3_650 * _DAY


class BadArgument(ValueError):
    """A command-line argument cannot be used; the message says why."""

    code = "bad_argument"


def add_commands(commands: Any) -> None:
    """Add `tenants` and `keys` to the command line."""
    tenants = commands.add_parser("tenants", help="make and list tenants").add_subparsers(
        dest="action", required=True
    )
    tenants.add_parser("create", help="make a tenant").add_argument("tenant")
    tenants.add_parser("list", help="list all tenants, one in a line of JSON")
    quotas = tenants.add_parser("quotas", help="say what a tenant may have, all of it at once")
    quotas.add_argument("tenant")
    quotas.add_argument("quotas", help='JSON, e.g. {"items_per_second": 50, "max_adapters": 10}')
    tenants.add_parser(
        "erase", help="erase a tenant with all that it has, and print the receipt"
    ).add_argument("tenant")

    keys = commands.add_parser("keys", help="make, list, rotate and revoke a tenant's keys").add_subparsers(
        dest="action", required=True
    )
    create = keys.add_parser("create", help="make a key, and print it: it is shown this once")
    create.add_argument("tenant")
    create.add_argument(
        "--scopes", default="predict,adapt", help="of predict,adapt,admin (default: %(default)s)"
    )
    create.add_argument("--note", default="", help="what it is for")
    create.add_argument("--days", type=float, help="after which it expires (default: never)")
    keys.add_parser("list", help="list a tenant's keys, one in a line of JSON").add_argument("tenant")
    rotate = keys.add_parser("rotate", help="make a key in the place of another, and print it")
    rotate.add_argument("tenant")
    rotate.add_argument("key", help="its id")
    rotate.add_argument(
        "--grace", type=float, default=3_600, help="seconds the old one goes on (default: %(default)s)"
    )
    revoke = keys.add_parser("revoke", help="revoke a key")
    revoke.add_argument("tenant")
    revoke.add_argument("key", help="its id")


def run(options: argparse.Namespace) -> int:
    """Run the command and return the exit status. Raises RegistryError, BadArgument."""
    # These imports are late because `topwork serve` must set the environment first.
    from adapters.registry.registry import Registry
    from service.settings import Settings

    settings = Settings()
    registry = Registry(settings.database)
    try:
        registry.require_current()
        for line in _lines(registry, settings, options):
            print(line)
    finally:
        registry.close()
    return 0


def _lines(registry: Registry, settings: Settings, options: argparse.Namespace) -> Iterable[str]:
    from adapters.storage.artifact import is_tenant

    tenants = registry.tenants
    match (options.command, options.action):
        case ("tenants", "create"):
            if not is_tenant(options.tenant):
                raise BadArgument("A tenant's name is 1 to 63 of a-z, 0-9, dot, underscore and dash.")
            yield _json(tenants.create(options.tenant))
        case ("tenants", "list"):
            after = None
            while page := tenants.tenants(after):
                yield from map(_json, page)
                after = page[-1].name
        case ("tenants", "quotas"):
            yield _json(tenants.set_quotas(options.tenant, _quotas(options.quotas)))
        case ("tenants", "erase"):
            yield _json(_erase(registry, settings, options.tenant))
        case ("keys", "create"):
            lifetime = None if options.days is None else _duration(options.days * _DAY, 60.0)
            scopes = _scopes(options.scopes)
            yield tenants.create_key(options.tenant, scopes, note=options.note, lifetime=lifetime)[1]
        case ("keys", "list"):
            yield from map(_json, tenants.keys(options.tenant))
        case ("keys", "rotate"):
            yield tenants.rotate(options.tenant, options.key, _duration(options.grace, 0.0))[1]
        case ("keys", "revoke"):
            yield _json(tenants.revoke(options.tenant, options.key))


def _erase(registry: Registry, settings: Settings, tenant: str) -> Receipt:
    """Erase the tenant in database and store; running services notice within a second."""
    from adapters.adaptation.erasure import ErasureSweeper
    from adapters.storage.open import open_store

    store = open_store(settings.store, settings.store_options)
    registry.identity.check(store)
    receipt = registry.erasures.tenant(tenant)
    ErasureSweeper(registry, store).clear()
    return receipt


def _duration(seconds: float, least: float) -> timedelta:
    if not least <= seconds <= _LONGEST:
        raise BadArgument(f"That is from {least:g} seconds to ten years.")
    return timedelta(seconds=seconds)


def _quotas(text: str) -> Quotas:
    from pydantic import ValidationError

    from adapters.registry.tenants import Quotas
    from service.payloads.tenants import QuotasIn

    try:
        return Quotas(**QuotasIn.model_validate_json(text).model_dump())
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"{part}: " for part in first["loc"])
        raise BadArgument(f"These are no quotas: {where}{first['msg']}.") from error


def _scopes(text: str) -> list[Scope]:
    from adapters.registry.tenants import Scope

    names = {name.strip() for name in text.split(",")}
    found: list[Scope] = [scope for scope in get_args(Scope) if scope in names]
    if len(found) != len(names):
        raise BadArgument(f"{text!r} are no scopes; choose from {','.join(get_args(Scope))}.")
    return found


def _json(record: TenantRecord | KeyRecord | Receipt) -> str:
    return json.dumps(asdict(record), default=datetime.isoformat)

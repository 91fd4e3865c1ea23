"""Requests made from the service's own document, right and wrong ones, at every route: it holds of each."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import APIOperation, Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from benchmarks.harness.service_process import Serving
from tests.faults import times
from tests.support.service.client import JSON, Caller, reviews
from tests.support.service.document import ROUTES

ADMIN = "0123456789abcdef0123456789abcdef"
SERVICES = 2
CASES = times(20_000, 300) // SERVICES
MODES = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
# Without workers jobs stay queued. The short timeout ends their event streams within seconds.
SETTINGS = {"TOPWORK_BACKBONES": "minilm-l6-v2", "TOPWORK_WORKERS": "0", "TOPWORK_REQUEST_TIMEOUT": "20"}
# Deleted objects are created again after this number of routes.
_RENEW = 4
Headers = dict[str, str]
Operation = APIOperation[Any, Any, Any, Any]


class Place:
    """A service, and for each route a tenant with something that is there to be found."""

    def __init__(self, serving: Serving, admin: str | None = None) -> None:
        self.serving = serving
        self.url = serving.url
        self.who: list[Headers] = []
        self.known: dict[str, Any] = {}
        self._admin = {} if admin is None else {"Authorization": f"Bearer {admin}"}
        self._tenants = 0

    def renew(self) -> None:
        """Another tenant, with an adapter, a job that has ended, and a key to lose."""
        self._tenants += 1
        caller = Caller(self.url, f"schema-{self._tenants}")
        with caller.http:
            caller.http.headers.update(self._admin)
            caller.call("POST", "/tenants", 201, json={"tenant": caller.tenant})
            keys = f"/tenants/{caller.tenant}/keys"
            lost = caller.call("POST", keys, 201, json={"scopes": ["predict"]})
            caller.adapt("films", reviews(2))
            lines = "\n".join(json.dumps(one) for one in reviews(1)).encode()
            upload = {"content": lines, "headers": {"Content-Type": "application/x-ndjson"}}
            job = caller.call("POST", "/adapt?adapter=films", 202, **upload)["id"]
            caller.call("POST", f"/jobs/{job}/cancel")
            self.who = [{**self._admin, "X-Tenant": caller.tenant}]
            if self._admin:
                scopes: list[list[str]] = [["predict", "adapt", "admin"], ["predict"]]
                own = [caller.call("POST", keys, 201, json={"scopes": one})["key"] for one in scopes]
                self.who += [{"Authorization": f"Bearer {key}"} for key in (*own, "nonsense")]
        self.known = {
            "tenant": caller.tenant,
            "key": lost["id"],
            "adapter": "films",
            "job": job,
            "example": "good0",
            "version": 1,
            "backbone": "minilm-l6-v2",
            "model": "minilm-l6-v2",
        }

    def runs(self) -> bool:
        """True if the service is alive and answers."""
        with Caller(self.url).http as http:
            return self.serving.process.poll() is None and http.get("/readyz").status_code == 200


@pytest.fixture(scope="module")
def open_place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A service without keys."""
    with Serving(tmp_path_factory.mktemp("open"), environment=SETTINGS) as serving:
        yield Place(serving)


@pytest.fixture
def guarded_place(tmp_path: Path, postgres_url: str) -> Iterator[Place]:
    """A service that asks for keys, and whose database is the stricter one about texts."""
    more = {"TOPWORK_ADMIN_KEY": ADMIN, "TOPWORK_DATABASE_URL": postgres_url}
    with Serving(tmp_path, environment={**SETTINGS, **more}) as serving:
        yield Place(serving, ADMIN)


def test_an_open_service_is_what_its_document_says(open_place: Place) -> None:
    answers_as_documented(open_place)


def test_a_service_with_keys_is_what_its_document_says(guarded_place: Place) -> None:
    answers_as_documented(guarded_place)


def answers_as_documented(place: Place) -> None:
    schema = schemathesis.openapi.from_url(f"{place.url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations() if isinstance(found, Ok)]
    assert {(one.method, one.path) for one in operations} == ROUTES
    each = math.ceil(CASES / (len(operations) * len(MODES)))
    failures: list[str] = []
    count = number = 0
    # Some routes take nothing that could be wrong, so one round is not enough.
    while count < CASES:
        for index, operation in enumerate(operations):
            if index % _RENEW == 0:
                place.renew()
            for mode in MODES:
                number += 1
                count += try_out(place, operation, mode, each, number, failures)
        assert number < 1_000, "no cases are made"
    assert not failures, f"{len(failures)} of {count}:\n\n" + "\n\n".join(sorted(set(failures))[:20])
    assert place.runs()


def try_out(
    place: Place, operation: Operation, mode: GenerationMode, each: int, number: int, failures: list[str]
) -> int:
    """Calls the operation, and adds what is wrong with its answers to `failures`. How often it did."""
    called = 0

    @seed(number)
    @settings(
        max_examples=each,
        database=None,
        deadline=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(
        case=operation.as_strategy(mode), who=st.integers(0, 1_000), real=st.sampled_from((True, True, False))
    )
    def call(case: Case[Any], who: int, real: bool) -> None:
        nonlocal called
        called += 1
        headers = dict(place.who[who % len(place.who)])
        if real:
            name_what_is_there(case, place.known)
        else:
            headers.pop("X-Tenant", None)
        # Raised here, Hypothesis would try the case again, at a service that is not the same any more.
        try:
            response = case.call(base_url=place.url, headers=headers, timeout=40)
            case.validate_response(response, checks=CHECKS, headers=headers)
        except FailureGroup as error:
            failures.append(f"{operation.label}: {error}")
        except Exception as error:
            failures.append(f"{operation.label}: no answer: {error!r}")

    with suppress(Unsatisfiable):
        call()
    return called


def name_what_is_there(case: Case[Any], known: dict[str, Any]) -> None:
    """Puts names that lead somewhere in the place of those that were made up."""
    for place in (case.path_parameters, case.query, case.body):
        if isinstance(place, dict):
            place.update({name: known[name] for name in place if name in known})


def test_what_nobody_documents_is_found(open_place: Place) -> None:
    """The checks see an answer that the document does not have: they are not blind."""
    with Caller(open_place.url).http as http:
        document = http.get("/openapi.json", headers=JSON).json()
    document["paths"] = {"/backbones": document["paths"]["/backbones"]}
    del document["paths"]["/backbones"]["get"]["responses"]["200"]
    schema = schemathesis.openapi.from_dict(document)
    case = schema["/backbones"]["GET"].Case()
    with pytest.raises(FailureGroup, match="Undocumented"):
        case.validate_response(case.call(base_url=open_place.url), checks=CHECKS)

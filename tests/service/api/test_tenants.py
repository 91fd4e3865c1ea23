"""Tenants and keys over HTTP, at a service that asks for keys."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.harness.service_process import Serving
from service.payloads.responses.adaptation import ErasureOut
from service.payloads.responses.tenants import KeyOut, KeysOut, NewKeyOut, TenantOut, TenantsOut
from tests.support.conditions import until
from tests.support.service.client import UNSEEN, Caller, reviews
from tests.support.service.document import exactly

ADMIN = "0123456789abcdef0123456789abcdef"
PLAIN = {"content-type": "text/plain"}
Json = dict[str, Any]


class Keyed(Caller):
    """A caller with a key."""

    def __init__(self, url: str, key: str | None, tenant: str | None = None) -> None:
        super().__init__(url, tenant or "none")
        del self.http.headers["X-Tenant"]
        if key is not None:
            self.http.headers["Authorization"] = f"Bearer {key}"
        if tenant is not None:
            self.http.headers["X-Tenant"] = tenant


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    home = tmp_path_factory.mktemp("guarded")
    with Serving(home, environment={"TOPWORK_ADMIN_KEY": ADMIN, "TOPWORK_WORKERS": "0"}) as serving:
        yield serving


class Place:
    """A service that asks for keys, with its operator."""

    def __init__(self, serving: Serving) -> None:
        self.serving = serving
        self.operator = Keyed(serving.url, ADMIN)
        self._open = [self.operator]

    def tenant(self) -> str:
        name = f"t-{uuid.uuid4().hex[:12]}"
        exactly(TenantOut, self.operator.call("POST", "/tenants", 201, json={"tenant": name}))
        return name

    def key(self, tenant: str, *scopes: str, **fields: Any) -> Json:
        body = {"scopes": scopes, **fields}
        made = self.operator.call("POST", f"/tenants/{tenant}/keys", 201, json=body)
        exactly(NewKeyOut, made)
        return made

    def with_key(self, key: str | None, tenant: str | None = None) -> Keyed:
        self._open.append(Keyed(self.serving.url, key, tenant))
        return self._open[-1]

    def close(self) -> None:
        for one in self._open:
            one.http.close()


@pytest.fixture
def place(guarded: Serving) -> Iterator[Place]:
    place = Place(guarded)
    yield place
    place.close()


def test_a_key_is_its_tenant(place: Place) -> None:
    tenant = place.tenant()
    caller = place.with_key(place.key(tenant, "adapt", "predict")["key"])
    caller.adapt("films", reviews())
    assert len(caller.predict("films", [{"text": "wonderful"}])["predictions"]) == 1
    assert [one["adapter"] for one in caller.call("GET", "/adapters")["adapters"]] == ["films"]
    named = place.with_key(ADMIN, tenant)
    assert [one["adapter"] for one in named.call("GET", "/adapters")["adapters"]] == ["films"]
    assert place.operator.call("GET", f"/tenants/{tenant}")["adapters"] == 1
    answer = caller.http.get("/adapters", headers={"X-Tenant": "default"})
    assert (answer.status_code, answer.json()["code"]) == (403, "wrong_tenant")
    assert caller.http.get("/adapters", headers={"X-Tenant": tenant}).status_code == 200


def test_a_key_opens_what_its_scopes_say_and_no_more(place: Place) -> None:
    tenant = place.tenant()
    callers = {
        scope: place.with_key(place.key(tenant, scope)["key"]) for scope in ("predict", "adapt", "admin")
    }
    callers["adapt"].adapt("films", reviews())
    requests: list[tuple[str, str, str, Json]] = [
        ("predict", "POST", "/predict", {"json": {"adapter": "films", "inputs": [{"text": "dull"}]}}),
        ("predict", "POST", "/predict?adapter=films", {"content": "dull", "headers": PLAIN}),
        ("predict", "POST", "/embed", {"json": {"backbone": "minilm-l6-v2", "inputs": [{"text": "x"}]}}),
        ("predict", "POST", "/v1/embeddings", {"json": {"model": "minilm-l6-v2", "input": "x"}}),
        ("adapt", "GET", "/adapters/films/versions/1/export?format=safetensors", {}),
        ("adapt", "PUT", "/adapters/films/aliases/live", {"json": {"version": 1}}),
        ("adapt", "POST", "/adapt", {"json": {"adapter": "films", "examples": reviews()}}),
        ("adapt", "GET", "/adapters/films/examples", {}),
        ("adapt", "GET", "/adapters/films/examples/good1", {}),
        ("adapt", "PATCH", "/adapters/films/examples/good1", {"json": {"excluded": True}}),
        ("adapt", "POST", "/adapters/films/versions/1/restore", {}),
        ("adapt", "DELETE", "/adapters/films/examples/good1", {}),
        ("adapt", "POST", "/adapters/films/feedback", {"json": {"id": "good2", "label": "good"}}),
        ("adapt", "GET", "/jobs", {}),
        ("adapt", "DELETE", "/adapters/films", {}),
        ("admin", "GET", f"/tenants/{tenant}", {}),
        ("admin", "GET", f"/tenants/{tenant}/keys", {}),
        ("admin", "POST", f"/tenants/{tenant}/keys", {"json": {"scopes": ["predict"]}}),
    ]  # fmt: skip
    for needed, method, path, request in requests:
        for scope, caller in callers.items():
            if scope != needed:
                assert caller.code(method, path, 403, **request) == "scope_missing", path
        answer = callers[needed].http.request(method, path, **request)
        assert answer.status_code < 300, (path, answer.text)
    for caller in callers.values():
        caller.call("GET", "/adapters")
        caller.call("GET", "/backbones")
        caller.call("GET", "/nowhere", 404)


def test_a_tenants_admin_sees_to_its_own_keys_and_nobody_elses(place: Place) -> None:
    own, other = place.tenant(), place.tenant()
    theirs = place.key(other, "predict")
    admin = place.with_key(place.key(own, "admin")["key"])
    made = admin.call("POST", f"/tenants/{own}/keys", 201, json={"scopes": ["predict"], "note": "shop"})
    listed = admin.call("GET", f"/tenants/{own}/keys")
    exactly(KeysOut, listed)
    assert [one["note"] for one in listed["keys"]] == ["", "shop"]
    assert made["key"] not in json.dumps(listed)
    exactly(KeyOut, admin.call("DELETE", f"/tenants/{own}/keys/{made['id']}"))
    for method, path in (("GET", "/tenants"), ("POST", "/tenants")):
        problem = admin.call(method, path, 403, json={"tenant": "x"} if method == "POST" else None)
        assert problem["code"] == "operator_only"
    body = {"scopes": ["predict"]}
    for method, path, sent in (
        ("GET", "/tenants/{}", None),
        ("GET", "/tenants/{}/keys", None),
        ("POST", "/tenants/{}/keys", body),
        ("POST", "/tenants/{}/keys/" + theirs["id"] + "/rotate", {}),
        ("DELETE", "/tenants/{}/keys/" + theirs["id"], None),
    ):
        answers = []
        for name in (other, "a-" + other[2:]):
            problem = admin.call(method, path.format(name), 404, json=sent)
            assert problem["code"] == "unknown_tenant"
            answers.append(json.dumps({**problem, "request_id": ""}).replace(name, "…"))
        assert answers[0] == answers[1]


def test_another_tenants_adapter_answers_as_one_that_does_not_exist(place: Place) -> None:
    owner = place.with_key(place.key(place.tenant(), "adapt", "predict")["key"])
    owner.adapt("films", reviews())
    stranger = place.with_key(place.key(place.tenant(), "adapt", "predict")["key"])
    text = {"text": "dull"}
    requests: list[tuple[str, str, Json]] = [
        ("POST", "/predict", {"json": {"adapter": "ADAPTER", "inputs": [text]}}),
        ("POST", "/predict", {"json": {"adapter": "ADAPTER", "inputs": [text], "version": 1}}),
        ("POST", "/predict?adapter=ADAPTER", {"content": b"dull", "headers": PLAIN}),
        ("POST", "/adapt", {"json": {"adapter": "ADAPTER", "examples": []}}),
        ("POST", "/adapt", {"json": {"adapter": "ADAPTER", "examples": [], "method": "fine_tune"}}),
        ("GET", "/adapters/ADAPTER", {}),
        ("DELETE", "/adapters/ADAPTER", {}),
        ("GET", "/adapters/ADAPTER/versions", {}),
        ("GET", "/adapters/ADAPTER/versions/1", {}),
        ("GET", "/adapters/ADAPTER/versions/1/export", {}),
        ("PUT", "/adapters/ADAPTER/aliases/live", {"json": {"version": 1}}),
        ("POST", "/adapters/ADAPTER/versions/1/restore", {}),
        ("POST", "/adapters/ADAPTER/rebase", {"json": {"backbone": "minilm-l6-v2"}}),
        ("GET", "/adapters/ADAPTER/examples", {}),
        ("DELETE", "/adapters/ADAPTER/examples?all=true", {}),
        ("GET", "/adapters/ADAPTER/examples/good1", {}),
        ("PATCH", "/adapters/ADAPTER/examples/good1", {"json": {"excluded": True}}),
        ("DELETE", "/adapters/ADAPTER/examples/good1", {}),
        ("POST", "/adapters/ADAPTER/feedback", {"json": {"id": "good1", "label": "bad"}}),
        ("GET", "/jobs?adapter=ADAPTER", {}),
    ]  # fmt: skip
    for method, path, request in requests:
        answers = []
        for name in ("films", "nilms"):
            sent = dict(request)
            if "json" in sent:
                sent["json"] = {**sent["json"], **({"adapter": name} if "adapter" in sent["json"] else {})}
            answer = stranger.http.request(method, path.replace("ADAPTER", name), **sent)
            assert answer.status_code in (404, 422) or path.startswith("/jobs"), (path, answer.text)
            told = {**answer.json(), "request_id": ""}
            left = {k: v for k, v in answer.headers.items() if k not in ("x-request-id", "date")}
            answers.append((answer.status_code, left, json.dumps(told).replace(name, "…")))
        assert answers[0] == answers[1], path
    assert owner.call("GET", "/adapters/films")["live"] == 1


def test_a_revoked_key_opens_nothing_at_once_where_it_is_revoked(place: Place) -> None:
    tenant = place.tenant()
    made = place.key(tenant, "adapt", "predict")
    caller = place.with_key(made["key"])
    caller.adapt("films", reviews())
    caller.predict("films", [{"text": "dull"}])
    place.operator.call("DELETE", f"/tenants/{tenant}/keys/{made['id']}")
    body = {"adapter": "films", "inputs": [{"text": "dull"}]}
    answer = caller.http.post("/predict", json=body)
    assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized")


def test_keys_and_quotas_hold_within_a_second_at_another_service(postgres_url: str, tmp_path: Path) -> None:
    """Two services on one database, though the key is in use on the other."""
    shared = {
        "TOPWORK_ADMIN_KEY": ADMIN,
        "TOPWORK_WORKERS": "0",
        "TOPWORK_BACKBONES": "minilm-l6-v2",
        "TOPWORK_DATABASE_URL": postgres_url,
        "TOPWORK_STORE_URL": str(tmp_path / "artifacts"),
    }
    with (
        Serving(tmp_path / "here", environment=shared) as here,
        Serving(tmp_path / "there", environment=shared) as there,
    ):
        place = Place(here)
        tenant = place.tenant()
        made = place.key(tenant, "adapt")
        caller = Keyed(there.url, made["key"])

        def answers(status: int) -> bool:
            return caller.http.get("/adapters").status_code == status

        assert answers(200)
        place.operator.call("PUT", f"/tenants/{tenant}/quotas", json={"requests_per_second": 0.001})
        until(lambda: answers(429), 1.0)
        place.operator.call("PUT", f"/tenants/{tenant}/quotas", json={})
        until(lambda: answers(200), 1.0)
        place.operator.call("DELETE", f"/tenants/{tenant}/keys/{made['id']}")
        until(lambda: answers(401), 1.0)
        caller.http.close()
        place.close()


def test_a_rotated_key_goes_on_for_its_grace(place: Place) -> None:
    tenant = place.tenant()
    old = place.key(tenant, "predict", note="shop")
    path = f"/tenants/{tenant}/keys/{old['id']}/rotate"
    new = place.operator.call("POST", path, 201, json={"grace": 60})
    exactly(NewKeyOut, new)
    for key in (old["key"], new["key"]):
        place.with_key(key).call("GET", "/adapters")
    place.operator.call("POST", path, 201, json={"grace": 0})
    place.operator.call("POST", path, 409, json={"grace": 0})
    place.with_key(new["key"]).call("GET", "/adapters")


@pytest.mark.parametrize(
    "key",
    [None, "tw_", "tw_0123456789abcdef_", "tw_0123456789abcdef_x", f"{ADMIN}x", "tw_é_é", "tw_%00_x"],
)
def test_what_is_no_key_opens_nothing(place: Place, key: str | None) -> None:
    headers = {} if key is None else {b"Authorization": b"Bearer " + key.encode("latin-1")}
    for path in ("/adapters", "/tenants", "/predict", "/nowhere"):
        answer = httpx.get(place.serving.url + path, headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized")


def test_a_key_with_another_secret_opens_nothing(place: Place) -> None:
    made = place.key(place.tenant(), "predict")
    for wrong in (made["key"][:-1], made["key"] + "x", made["key"][:-1] + "_"):
        place.with_key(wrong).call("GET", "/adapters", 401)


@pytest.mark.parametrize(
    "body",
    [{}, {"scopes": []}, {"scopes": ["root"]}, {"scopes": ["predict"], "expires_in": 0},
     {"scopes": ["predict"], "note": "x" * 201}, {"scopes": ["predict"], "note": "a\0b"},
     {"scopes": ["predict"], "more": 1}, {"scopes": "predict"}],
)  # fmt: skip
def test_a_key_that_cannot_be_made(place: Place, body: Json) -> None:
    place.operator.call("POST", f"/tenants/{place.tenant()}/keys", 422, json=body)


@pytest.mark.parametrize("name", ["", "A", "-a", "a/b", "a" * 64, "ä", "a\x00"])
def test_a_tenant_that_cannot_be_made(place: Place, name: str) -> None:
    place.operator.call("POST", "/tenants", 422, json={"tenant": name})


def test_a_tenant_is_made_once(place: Place) -> None:
    name = place.tenant()
    place.operator.call("POST", "/tenants", 409, json={"tenant": name})
    found: list[str] = []
    cursor: str | None = ""
    while cursor is not None:
        page = place.operator.call("GET", f"/tenants?limit=2{cursor and '&cursor=' + cursor}")
        exactly(TenantsOut, page)
        found += [one["tenant"] for one in page["tenants"]]
        cursor = page["next"]
    assert found == sorted(set(found))
    assert name in found
    place.operator.call("GET", "/tenants/nobody-at-all", 404)
    place.operator.call("GET", "/tenants/%00", 400)
    place.operator.call("DELETE", f"/tenants/{name}/keys/%00", 400)
    place.operator.call("DELETE", f"/tenants/{name}/keys/%F0", 404)


def command(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(Path(sys.executable).with_name("topwork")), *arguments],
        env={**os.environ, "TOPWORK_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_command_line_makes_keys_for_the_running_service(place: Place) -> None:
    home = place.serving.home
    assert command(home, "tenants", "create", "by-hand").returncode == 0
    assert "by-hand" in command(home, "tenants", "list").stdout
    key = command(home, "keys", "create", "by-hand", "--scopes", "predict", "--days", "1").stdout.strip()
    place.with_key(key).call("GET", "/adapters")
    listed = json.loads(command(home, "keys", "list", "by-hand").stdout)
    assert listed["id"] in key
    newer = command(home, "keys", "rotate", "by-hand", listed["id"], "--grace", "0").stdout.strip()
    place.with_key(newer).call("GET", "/adapters")
    revoked = command(home, "keys", "revoke", "by-hand", newer.split("_")[1])
    assert json.loads(revoked.stdout)["revoked_at"]
    set_to = command(home, "tenants", "quotas", "by-hand", '{"items_per_second": 5, "max_adapters": 2}')
    assert json.loads(set_to.stdout)["quotas"]["items_per_second"] == 5
    assert place.operator.call("GET", "/tenants/by-hand")["quotas"]["max_adapters"] == 2
    for arguments, says in (
        (("keys", "create", "nobody"), "no tenant"),
        (("keys", "create", "by-hand", "--days", "1e300"), "ten years"),
        (("keys", "create", "by-hand", "--days", "nan"), "ten years"),
        (("keys", "create", "by-hand", "--days", "0"), "60 seconds"),
        (("tenants", "quotas", "by-hand", '{"items_per_second": -1}'), "items_per_second"),
        (("tenants", "quotas", "by-hand", "much"), "JSON"),
        (("tenants", "quotas", "nobody", "{}"), "no tenant"),
        (("tenants", "erase", "nobody"), "no tenant"),
        (("tenants", "create", "by-hand"), "already"),
        (("tenants", "create", "No"), "a-z"),
        (("keys", "create", "by-hand", "--scopes", "root"), "predict"),
    ):
        done = command(home, *arguments)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("topwork: ")
        assert says in done.stderr
        assert "Traceback" not in done.stderr
    place.with_key(newer).call("GET", "/adapters", 401)
    receipt = json.loads(command(home, "tenants", "erase", "by-hand").stdout)
    assert (receipt["tenant"], receipt["keys"]) == ("by-hand", 2)
    assert place.operator.code("GET", "/tenants/by-hand", 404) == "unknown_tenant"


def test_a_tenant_is_erased_with_a_receipt(place: Place) -> None:
    tenant = place.tenant()
    caller = place.with_key(place.key(tenant, "predict", "adapt", "admin")["key"])
    caller.adapt("films", reviews())
    # A key that may create keys may not erase the tenant.
    assert caller.code("DELETE", f"/tenants/{tenant}", 403) == "operator_only"
    caller.call("DELETE", "/adapters/none", 404)
    receipt = place.operator.call("DELETE", f"/tenants/{tenant}")
    exactly(ErasureOut, receipt)
    assert (receipt["tenant"], receipt["adapters"], receipt["keys"]) == (tenant, 1, 1)
    assert receipt["examples"] == len(reviews())
    # At once where it was erased.
    caller.call("GET", "/adapters", 401)
    assert place.operator.code("DELETE", f"/tenants/{tenant}", 404) == "unknown_tenant"
    assert place.operator.code("POST", "/tenants", 409, json={"tenant": tenant}) == "tenant_erased"
    time.sleep(6)
    place.operator.call("POST", "/tenants", 201, json={"tenant": tenant})
    assert place.operator.call("GET", f"/tenants/{tenant}")["adapters"] == 0


def test_images_too(place: Place) -> None:
    caller = place.with_key(place.key(place.tenant(), "predict")["key"])
    answer = caller.http.post(
        "/embed?backbone=efficientnet-lite0", content=UNSEEN["cow"], headers={"content-type": "image/png"}
    )
    assert answer.status_code == 200


def test_quotas_by_the_second_are_heeded_soon_and_say_when_to_come_again(place: Place) -> None:
    tenant = place.tenant()
    caller = place.with_key(place.key(tenant, "predict", "adapt")["key"])
    caller.adapt("films", reviews())
    path = f"/tenants/{tenant}/quotas"
    out = place.operator.call("PUT", path, json={"items_per_second": 2, "max_adapters": 1})
    exactly(TenantOut, out)
    assert out["quotas"]["items_per_second"] == 2
    begin = time.monotonic()
    text = {"adapter": "films", "inputs": [{"text": "dull"}] * 10}
    while (answer := caller.http.post("/predict", json=text)).status_code == 200:
        assert time.monotonic() - begin < 5
    assert (answer.status_code, answer.json()["code"]) == (429, "rate_exceeded")
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    caller.call("GET", "/adapters", 429)
    # The operator is not a tenant, and other tenants know nothing of it.
    place.operator.call("GET", f"/tenants/{tenant}")
    place.with_key(place.key(place.tenant(), "predict")["key"]).call("GET", "/adapters")
    admin = place.with_key(place.key(place.tenant(), "admin")["key"])
    place.operator.call("PUT", path, json={})
    assert admin.http.put(path, json={}).status_code in (403, 404)


def test_quotas_of_what_is_kept(place: Place) -> None:
    tenant = place.tenant()
    caller = place.with_key(place.key(tenant, "adapt")["key"])
    place.operator.call("PUT", f"/tenants/{tenant}/quotas", json={"max_adapters": 1, "max_examples": 12})
    caller.adapt("films", reviews())
    for adapter, examples in (("books", reviews()), ("films", [{"text": "One more", "label": "good"}])):
        problem = caller.adapt(adapter, examples, 409)
        assert problem["code"] == "quota_exceeded"
    assert caller.call("GET", "/adapters/films")["examples"] == 12
    caller.call("GET", "/adapters/books", 404)


@pytest.mark.parametrize(
    "quotas",
    [{"items_per_second": 0}, {"items_per_second": -1}, {"items_per_second": "5"}, {"max_adapters": 1.5},
     {"max_examples": 2**40}, {"more": 1}, {"bytes_per_second": True}],
)  # fmt: skip
def test_quotas_that_cannot_be(place: Place, quotas: Json) -> None:
    place.operator.call("PUT", f"/tenants/{place.tenant()}/quotas", 422, json=quotas)

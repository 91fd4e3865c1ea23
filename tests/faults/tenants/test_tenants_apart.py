"""No tenant is ever answered with what is another's: not by any route, and not in batches that they share."""

from __future__ import annotations

import asyncio
import json
import random
import re
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest
from hypothesis import HealthCheck, currently_in_test_context, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from benchmarks.harness.service_process import Serving
from tests.faults import times
from tests.support.models import tiny_backbones
from tests.support.service.client import CLOSE

ADMIN = "0123456789abcdef0123456789abcdef"
SEED = 23
STEPS = 50
TENANTS = 3
SHARERS = 50
CONNECTIONS = 8
ADAPTERS = ("pets", "cars")
IDS = ("one", "two", "three", "four")
Json = dict[str, Any]


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A service with the tiny text backbone that asks for keys."""
    folder: Path = tmp_path_factory.mktemp("apart")
    _, text = tiny_backbones.install(folder / "bentoml", measured=True)
    environment = {
        "BENTOML_HOME": str(folder / "bentoml"),
        "TOPWORK_BACKBONES": text,
        "TOPWORK_ADMIN_KEY": ADMIN,
        "TOPWORK_MAX_WAIT": "60",
    }
    with Serving(folder / "home", environment=environment) as serving:
        yield serving


def operator(url: str) -> httpx.Client:
    """The operator, who has the admin key."""
    return httpx.Client(base_url=url, headers={"Authorization": f"Bearer {ADMIN}"}, timeout=120)


def keyed(url: str, admin: httpx.Client, name: str) -> httpx.Client:
    """A new tenant with a key of all scopes."""
    assert admin.post("/tenants", json={"tenant": name}).status_code == 201
    made = admin.post(f"/tenants/{name}/keys", json={"scopes": ["predict", "adapt", "admin"]})
    assert made.status_code == 201, made.text
    return httpx.Client(base_url=url, headers={"Authorization": f"Bearer {made.json()['key']}"}, timeout=120)


class Held:
    """A tenant's expected data: labels by example by adapter. canary: part of all its texts.

    texts: by adapter and example. aside: what is set aside. fitted: by adapter and version, the text and the
    label of each example that it has learned.
    """

    def __init__(self, url: str, admin: httpx.Client) -> None:
        self.name = f"t-{uuid.uuid4().hex[:12]}"
        self.canary = uuid.uuid4().hex[:12]
        self.http = keyed(url, admin, self.name)
        self.adapters: dict[str, dict[str, str]] = {}
        self.texts: dict[tuple[str, str], str] = {}
        self.aside: dict[str, set[str]] = {}
        self.fitted: dict[tuple[str, int], dict[str, tuple[str, str]]] = {}
        self.jobs: set[str] = set()

    def own(self, word: str) -> str:
        """The word, as only this tenant says it."""
        return f"{word}-{self.canary}"

    def learned(self, adapter: str, answer: Json) -> None:
        """Notes what the version of an answer was fitted on, if it made one."""
        if answer["version"] is not None:
            self.fitted[adapter, answer["version"]] = {
                name: (self.texts[adapter, name], label)
                for name, label in self.adapters[adapter].items()
                if name not in self.aside[adapter]
            }


class Apart(RuleBasedStateMachine):
    """Three tenants use names that all know, on every route. `url` is set on a subclass."""

    url = ""
    used: ClassVar[set[tuple[str, str]]] = set()

    # Hypothesis makes one more than it runs.
    tenants: Sequence[Held] = ()

    @initialize()
    def arrive(self) -> None:
        """The operator comes, and the tenants."""
        self.admin = operator(self.url)
        self.admin.event_hooks = {"response": [self.see]}
        self.tenants = [Held(self.url, self.admin) for _ in range(TENANTS)]
        for held in self.tenants:
            held.http.event_hooks = {"response": [self.see]}

    def see(self, answer: httpx.Response) -> None:
        """No answer is the service's own failure; the route counts as used."""
        assert answer.status_code < 500
        self.used.add((answer.request.method, answer.request.url.path))

    def ask(self, tenant: int, method: str, path: str, *statuses: int, **request: Any) -> httpx.Response:
        """The answer, of one of these statuses, in which nothing is another's."""
        asking = self.tenants[tenant]
        answer = asking.http.request(method, path, **request)
        if currently_in_test_context():
            note(f"{asking.name} {method} {path} {answer.status_code} {answer.text[:300]}")
        assert answer.status_code in (statuses or (200,)), answer.text[:2000]
        said = answer.content + repr(answer.headers).encode()
        for other in self.tenants:
            if other is not asking:
                assert other.canary.encode() not in said
                assert other.name.encode() not in said
        return answer

    @rule(tenant=st.integers(0, 2), adapter=st.sampled_from(ADAPTERS), seed=st.integers(0, 10**6))
    def adapt(self, tenant: int, adapter: str, seed: int) -> None:
        held = self.tenants[tenant]
        labels = {held.own(name): held.own(("good", "bad")[place % 2]) for place, name in enumerate(IDS)}
        examples = [
            {"id": name, "text": f"{tiny_backbones.sentence(seed + place)} {held.canary}", "label": label}
            for place, (name, label) in enumerate(labels.items())
        ]
        body = {"adapter": adapter, "promote": "always", "examples": examples}
        made = self.ask(tenant, "POST", "/adapt", json=body).json()
        held.adapters.setdefault(adapter, {}).update(labels)
        held.aside.setdefault(adapter, set()).difference_update(labels)
        held.texts |= {(adapter, one["id"]): one["text"] for one in examples}
        held.learned(adapter, made)
        assert made["examples"]["total"] == len(held.adapters[adapter])

    @rule(tenant=st.integers(0, 2), adapter=st.sampled_from(ADAPTERS), explain=st.integers(0, 2))
    def predict(self, tenant: int, adapter: str, explain: int) -> None:
        held = self.tenants[tenant]
        known = held.adapters.get(adapter, {})
        body = {"adapter": adapter, "inputs": [{"text": tiny_backbones.sentence(1)}], "explain": explain}
        answer = self.ask(tenant, "POST", "/predict", 200 if known else 404, 409, json=body)
        if answer.status_code == 200:
            (found,) = answer.json()["predictions"]
            labels = {held.own("good"), held.own("bad")}
            assert {one["label"] for one in found["probabilities"]} <= labels
            assert {one["id"] for one in found.get("nearest") or ()} <= held.adapters[adapter].keys()

    @rule(tenant=st.integers(0, 2))
    def embed(self, tenant: int) -> None:
        self.ask(
            tenant, "POST", "/embed", json={"backbone": tiny_backbones.TEXT_NAME, "inputs": [{"text": "ba"}]}
        )
        self.ask(tenant, "POST", "/v1/embeddings", json={"model": tiny_backbones.TEXT_NAME, "input": "ba"})
        self.ask(tenant, "GET", "/backbones")
        self.ask(tenant, "GET", "/v1/models")
        self.ask(tenant, "GET", f"/v1/models/{tiny_backbones.TEXT_NAME}")

    @rule(tenant=st.integers(0, 2), adapter=st.sampled_from(ADAPTERS))
    def look(self, tenant: int, adapter: str) -> None:
        held = self.tenants[tenant]
        listed = self.ask(tenant, "GET", "/adapters").json()["adapters"]
        assert {one["adapter"] for one in listed} == held.adapters.keys()
        status = 200 if adapter in held.adapters else 404
        self.ask(tenant, "GET", f"/adapters/{adapter}", status)
        versions = self.ask(tenant, "GET", f"/adapters/{adapter}/versions", status)
        examples = self.ask(tenant, "GET", f"/adapters/{adapter}/examples", status)
        if status == 200:
            listed = examples.json()["examples"]
            assert {one["id"]: one["label"] for one in listed} == held.adapters[adapter]
            assert {one["id"] for one in listed if one["excluded"]} == held.aside[adapter]
            path = f"/adapters/{adapter}/examples?excluded=true"
            aside = self.ask(tenant, "GET", path).json()["examples"]
            assert {one["id"] for one in aside} == held.aside[adapter]
            for one in versions.json()["versions"][:1]:
                path = f"/adapters/{adapter}/versions/{one['version']}"
                self.ask(tenant, "GET", path)
                self.ask(tenant, "GET", f"{path}/export?format=safetensors")
                self.ask(tenant, "PUT", f"/adapters/{adapter}/aliases/live", json={"version": one["version"]})

    @rule(tenant=st.integers(0, 2), of=st.integers(0, 2), adapter=st.sampled_from(ADAPTERS))
    def look_at_an_example(self, tenant: int, of: int, adapter: str) -> None:
        """Another's ids are unknown, also where they are."""
        name = self.tenants[of].own(IDS[0])
        status = 200 if name in self.tenants[tenant].adapters.get(adapter, {}) else 404
        path = f"/adapters/{adapter}/examples/{name}"
        asking = self.tenants[tenant]
        answer = asking.http.get(path)
        assert answer.status_code == status, answer.text
        if status == 200:
            assert asking.canary in answer.json()["text"]

    @rule(tenant=st.integers(0, 2), adapter=st.sampled_from(ADAPTERS))
    def rebase(self, tenant: int, adapter: str) -> None:
        held = self.tenants[tenant]
        body = {"backbone": tiny_backbones.TEXT_NAME}
        statuses = (200, 409, 422) if adapter in held.adapters else (404,)
        done = self.ask(tenant, "POST", f"/adapters/{adapter}/rebase", *statuses, json=body)
        if done.status_code == 200:
            held.learned(adapter, done.json())

    @rule(
        tenant=st.integers(0, 2),
        of=st.integers(0, 2),
        adapter=st.sampled_from(ADAPTERS),
        place=st.integers(0, 3),
        good=st.none() | st.booleans(),
        excluded=st.booleans(),
    )
    def amend(
        self, tenant: int, of: int, adapter: str, place: int, good: bool | None, excluded: bool
    ) -> None:
        """Another's example is unknown; one's own is what it is said to be."""
        held = self.tenants[tenant]
        name = self.tenants[of].own(IDS[place])
        known = name in held.adapters.get(adapter, {})
        label = None if good is None else held.own("good" if good else "bad")
        body = {"label": label, "excluded": excluded, "promote": "always"}
        path = f"/adapters/{adapter}/examples/{name}"
        answer = held.http.patch(path, json=body)
        # A change that leaves fewer than two labels is refused and not stored.
        assert answer.status_code in ((200, 422) if known else (404,)), answer.text
        if answer.status_code == 200:
            held.adapters[adapter][name] = label or held.adapters[adapter][name]
            (held.aside[adapter].add if excluded else held.aside[adapter].discard)(name)
            held.learned(adapter, answer.json())

    @rule(
        tenant=st.integers(0, 2),
        adapter=st.sampled_from(ADAPTERS),
        which=st.integers(0, 19),
        learn=st.booleans(),
    )
    def roll_back_and_restore(self, tenant: int, adapter: str, which: int, learn: bool) -> None:
        """A version fitted after a rollback is withheld; a restored one has its examples."""
        held = self.tenants[tenant]
        path = f"/adapters/{adapter}"
        if adapter not in held.adapters:
            self.ask(tenant, "PUT", f"{path}/aliases/live", 404, json={"version": 1})
            self.ask(tenant, "POST", f"{path}/versions/1/restore", 404)
            return
        versions = self.ask(tenant, "GET", f"{path}/versions").json()["versions"]
        if not versions:
            return
        number = versions[which % len(versions)]["version"]
        moved = self.ask(tenant, "PUT", f"{path}/aliases/live", json={"version": number}).json()
        if number == versions[0]["version"]:
            assert moved["rolled_back_at"] is None
        if moved["rolled_back_at"] is not None and learn:
            body = {"adapter": adapter}
            made = self.ask(tenant, "POST", "/adapt", 200, 422, json=body).json()
            if "report" in made:
                held.learned(adapter, made)
                assert made["report"]["promotion"]["reason"] == "rolled_back"
            assert self.ask(tenant, "GET", path).json()["live"] == number
        self.restore(tenant, adapter, number)

    def restore(self, tenant: int, adapter: str, number: int) -> None:
        held = self.tenants[tenant]
        path = f"/adapters/{adapter}"
        then = held.fitted[adapter, number]
        mine = held.adapters[adapter]
        same = {name for name in mine if name in then and held.texts[adapter, name] == then[name][0]}
        status = 200 if same else 409
        answer = self.ask(tenant, "POST", f"{path}/versions/{number}/restore", status)
        if status == 200:
            assert answer.json()["examples"]["in_use"] == len(same)
            assert answer.json()["examples"]["missing_total"] == len(then) - len(same)
            mine.update({name: then[name][1] for name in same})
            held.aside[adapter] = mine.keys() - same
            now = self.ask(tenant, "GET", path).json()
            assert (now["live"], now["rolled_back_at"]) == (number, None)
        self.look(tenant=tenant, adapter=adapter)

    @rule(tenant=st.integers(0, 2), adapter=st.sampled_from(ADAPTERS))
    def remove_two(self, tenant: int, adapter: str) -> None:
        held = self.tenants[tenant]
        names = [held.own(name) for name in IDS[2:]]
        has = adapter in held.adapters and set(names) <= held.adapters[adapter].keys()
        path = f"/adapters/{adapter}/examples"
        done = self.ask(tenant, "DELETE", path, 200 if has else 404, params={"id": names})
        if has:
            self.removed(held, adapter, names, done.json())

    def removed(self, held: Held, adapter: str, names: Sequence[str], answer: Json) -> None:
        """Versions that learned from the erased examples are gone too."""
        for name in names:
            del held.adapters[adapter][name]
            held.aside[adapter].discard(name)
        for (taught, number), learned in held.fitted.items():
            if taught == adapter and learned.keys() & set(names):
                assert (
                    number == answer["version"]
                    or held.http.get(f"/adapters/{adapter}/versions/{number}").status_code == 404
                )
        held.learned(adapter, answer)

    @rule(tenant=st.integers(0, 2), of=st.integers(0, 2))
    def make_and_end_keys(self, tenant: int, of: int) -> None:
        held, other = self.tenants[tenant], self.tenants[of]
        path = f"/tenants/{other.name}/keys"
        body = {"scopes": ["predict"], "note": held.canary}
        made = held.http.post(path, json=body)
        assert made.status_code == (201 if tenant == of else 404)
        if tenant == of:
            key = made.json()["id"]
            for stranger in self.tenants:
                if stranger is not held:
                    assert stranger.http.delete(f"{path}/{key}").status_code == 404
                    assert stranger.http.post(f"{path}/{key}/rotate", json={}).status_code == 404
            assert held.http.post(f"{path}/{key}/rotate", json={}).status_code == 201
            for one in held.http.get(path).json()["keys"]:
                if one["note"] == held.canary:
                    assert held.http.delete(f"{path}/{one['id']}").status_code == 200

    @rule(tenant=st.integers(0, 2))
    def operate(self, tenant: int) -> None:
        """Calls that only the operator may make."""
        held = self.tenants[tenant]
        quotas = f"/tenants/{held.name}/quotas"
        self.ask(tenant, "PUT", quotas, 403, json={"max_adapters": 100})
        self.ask(tenant, "POST", "/tenants", 403, json={"tenant": "new"})
        self.ask(tenant, "GET", "/metrics", 200, 401, 403)
        assert self.admin.put(quotas, json={"max_adapters": 100}).status_code == 200
        assert self.admin.get("/tenants").status_code == 200

    @rule(tenant=st.integers(0, 2), adapter=st.sampled_from(ADAPTERS), place=st.integers(0, 3))
    def remove_an_example(self, tenant: int, adapter: str, place: int) -> None:
        held = self.tenants[tenant]
        name = held.own(IDS[place])
        status = 200 if name in held.adapters.get(adapter, {}) else 404
        done = self.ask(tenant, "DELETE", f"/adapters/{adapter}/examples/{name}", status)
        if status == 200:
            self.removed(held, adapter, [name], done.json())

    @rule(tenant=st.integers(0, 2), adapter=st.sampled_from(ADAPTERS), good=st.booleans())
    def tell(self, tenant: int, adapter: str, good: bool) -> None:
        held = self.tenants[tenant]
        name, label = held.own(IDS[0]), held.own("good" if good else "bad")
        known = name in held.adapters.get(adapter, {})
        path = f"/adapters/{adapter}/feedback"
        # One label alone fits nothing, and is not stored.
        answer = self.ask(
            tenant, "POST", path, *((200, 422) if known else (404,)), json={"id": name, "label": label}
        )
        if answer.status_code == 200:
            held.adapters[adapter][name] = label
            held.aside[adapter].discard(name)
            held.learned(adapter, answer.json())

    @rule(tenant=st.integers(0, 2), adapter=st.sampled_from(ADAPTERS))
    def delete(self, tenant: int, adapter: str) -> None:
        held = self.tenants[tenant]
        self.ask(tenant, "DELETE", f"/adapters/{adapter}", 200 if adapter in held.adapters else 404)
        held.adapters.pop(adapter, None)
        held.aside.pop(adapter, None)
        held.fitted = {key: learned for key, learned in held.fitted.items() if key[0] != adapter}

    @rule(tenant=st.integers(0, 2), of=st.integers(0, 2))
    def submit_and_look_at_jobs(self, tenant: int, of: int) -> None:
        held, other = self.tenants[tenant], self.tenants[of]
        if not held.jobs:
            lines = "\n".join(
                json.dumps(
                    {"id": held.own(name), "text": tiny_backbones.sentence(place), "label": held.own(name)}
                )
                for place, name in enumerate(IDS)
            )
            made = self.ask(
                tenant, "POST", "/adapt?adapter=bulk", 202, content=lines,
                headers={"Content-Type": "application/x-ndjson"},
            )  # fmt: skip
            held.jobs.add(made.json()["id"])
            self.ask(tenant, "POST", f"/jobs/{made.json()['id']}/cancel", 200, 409)
            if self.ask(tenant, "GET", "/adapters/bulk", 200, 404).status_code == 200:
                self.ask(tenant, "DELETE", "/adapters/bulk")
        assert {one["id"] for one in self.ask(tenant, "GET", "/jobs").json()["jobs"]} <= held.jobs
        for job in sorted(other.jobs):
            status = (200,) if tenant == of else (404,)
            for path in (f"/jobs/{job}", f"/jobs/{job}/events"):
                answer = held.http.get(path)
                assert answer.status_code in (*status, 404), answer.text
                if tenant != of:
                    assert answer.status_code == 404
            if tenant != of:
                assert held.http.post(f"/jobs/{job}/cancel").status_code == 404

    @rule(tenant=st.integers(0, 2), of=st.integers(0, 2))
    def look_at_tenants(self, tenant: int, of: int) -> None:
        held, other = self.tenants[tenant], self.tenants[of]
        status = 200 if tenant == of else 404
        for path in (f"/tenants/{other.name}", f"/tenants/{other.name}/keys"):
            assert held.http.get(path).status_code == status
        self.ask(tenant, "GET", "/tenants", 403)
        named = held.http.get("/adapters", headers={"X-Tenant": other.name})
        assert named.status_code == (200 if tenant == of else 403)

    @invariant()
    def nothing_is_of_another(self) -> None:
        """The operator counts as each tenant does."""
        held = self.tenants[0]
        found = self.admin.get(f"/tenants/{held.name}").json()
        assert found["examples"] >= sum(len(kept) for kept in held.adapters.values())

    def teardown(self) -> None:
        for held in self.tenants:
            assert self.admin.delete(f"/tenants/{held.name}").status_code == 200
            held.http.close()
        if self.tenants:
            self.admin.close()


def test_what_tenants_see_is_theirs_alone(guarded: Serving) -> None:
    class Here(Apart):
        url = guarded.url

    walk_once(Here())
    runs = max(1, times(10_000, 150) // STEPS)
    run_state_machine_as_test(
        Here,
        settings=settings(
            max_examples=runs,
            stateful_step_count=STEPS,
            deadline=None,
            print_blob=True,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    with operator(guarded.url) as admin:
        paths = admin.get("/openapi.json").json()["paths"]
    unused = {
        f"{method.upper()} {path}"
        for path, methods in paths.items()
        for method in methods.keys() & {"get", "put", "post", "patch", "delete"}
        if not any(one == method.upper() and matches(path, asked) for one, asked in Here.used)
    }
    assert unused == set()


def walk_once(world: Apart) -> None:
    """Run every rule once."""
    world.arrive()
    for tenant in range(TENANTS):
        for adapter in ADAPTERS:
            world.adapt(tenant=tenant, adapter=adapter, seed=tenant)
            world.predict(tenant=tenant, adapter=adapter, explain=2)
            world.look(tenant=tenant, adapter=adapter)
            world.tell(tenant=tenant, adapter=adapter, good=False)
            world.rebase(tenant=tenant, adapter=adapter)
            world.amend(tenant=tenant, of=0, adapter=adapter, place=1, good=None, excluded=True)
            world.amend(tenant=tenant, of=tenant, adapter=adapter, place=1, good=True, excluded=False)
            world.roll_back_and_restore(tenant=tenant, adapter=adapter, which=1, learn=True)
            world.remove_two(tenant=tenant, adapter=adapter)
        world.embed(tenant=tenant)
        world.operate(tenant=tenant)
        for of in range(TENANTS):
            world.look_at_an_example(tenant=tenant, of=of, adapter="pets")
            world.submit_and_look_at_jobs(tenant=tenant, of=of)
            world.look_at_tenants(tenant=tenant, of=of)
            world.make_and_end_keys(tenant=tenant, of=of)
        world.remove_an_example(tenant=tenant, adapter="pets", place=0)
        world.delete(tenant=tenant, adapter="pets")
    world.teardown()


def matches(template: str, path: str) -> bool:
    """True if the path belongs to the route."""
    pattern = re.sub(r"\\{[^}]*\\}", "[^/]+", re.escape(template))
    return re.fullmatch(pattern, path) is not None


@pytest.mark.anyio
async def test_predicts_of_fifty_tenants_do_not_mix(guarded: Serving) -> None:
    rng = random.Random(SEED)
    admin = operator(guarded.url)
    names = [f"s{number}-{uuid.uuid4().hex[:8]}" for number in range(SHARERS)]
    keys = []
    for name in names:
        with keyed(guarded.url, admin, name) as http:
            keys.append(http.headers["Authorization"])
            examples = [
                {"text": tiny_backbones.sentence(rng.randrange(10**6)), "label": f"{name}-{place % 3}"}
                for place in range(9)
            ]
            made = http.post("/adapt", json={"adapter": "own", "examples": examples})
            assert made.status_code == 200, made.text
    admin.close()
    texts = [tiny_backbones.sentence(10**6 + number) for number in range(4)]
    limits = httpx.Limits(max_connections=CONNECTIONS)
    async with httpx.AsyncClient(base_url=guarded.url, timeout=120, limits=limits) as crowd:

        async def predict(tenant: int, text: int) -> dict[str, float]:
            headers = {"Authorization": keys[tenant]}
            body = {"adapter": "own", "inputs": [{"text": texts[text]}], "top_k": 3}
            answer = await crowd.post("/predict", json=body, headers=headers)
            assert answer.status_code == 200, answer.text
            (found,) = answer.json()["predictions"]
            return {one["label"]: one["probability"] for one in found["probabilities"]}

        alone = {
            (tenant, text): await predict(tenant, text)
            for tenant in range(SHARERS)
            for text in range(len(texts))
        }
        todo = iter([rng.choice(list(alone)) for _ in range(times(100_000, 1_000))])

        async def caller() -> None:
            for tenant, text in todo:
                together = await predict(tenant, text)
                expected = alone[tenant, text]
                assert all(label.startswith(f"{names[tenant]}-") for label in together), f"seed {SEED}"
                assert together.keys() == expected.keys(), f"seed {SEED}"
                worst = max(abs(together[label] - expected[label]) for label in expected)
                assert worst <= CLOSE, f"seed {SEED}: {worst}"

        await asyncio.gather(*(caller() for _ in range(CONNECTIONS * 2)))

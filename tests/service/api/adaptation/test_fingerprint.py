"""An adapter that was taught in an earlier release, whose backbone has another fingerprint now."""

from __future__ import annotations

from pathlib import Path

from benchmarks.harness.service_process import Serving
from tests.support.models import tiny_backbones
from tests.support.service.client import Caller, image


def test_an_adapter_of_an_earlier_release_says_how_it_is_moved(tmp_path: Path) -> None:
    names = tiny_backbones.install(tmp_path / "bentoml", crop_mode="center")
    environment = {
        "BENTOML_HOME": str(tmp_path / "bentoml"),
        "BENTOML_DO_NOT_TRACK": "true",
        "TOPWORK_BACKBONES": ",".join(names),
    }
    examples = [
        {"id": f"e{seed}", **image(tiny_backbones.picture(seed, (160, 40))), "label": "ab"[seed % 2]}
        for seed in range(12)
    ]
    asked = [image(tiny_backbones.picture(3, (160, 40)))]
    with Serving(tmp_path / "home", environment=environment) as served:
        before = Caller(served.url, "moved")
        before.adapt("long", examples)
        before.predict("long", asked)
        (earlier,) = (one["fingerprint"] for one in backbones(before, names[0]))
        before.http.close()
    # As a new release exports the same network.
    tiny_backbones.install(tmp_path / "bentoml")
    with Serving(tmp_path / "home", environment=environment) as served:
        after = Caller(served.url, "moved")
        (now,) = (one["fingerprint"] for one in backbones(after, names[0]))
        assert now != earlier
        for refused in (
            after.predict("long", asked, 409),
            after.adapt("long", [{**examples[0], "id": "new"}], 409),
            after.call("GET", "/adapters/long/versions/1/export", 409),
        ):
            assert refused["code"] == "fingerprint_mismatch"
            assert "POST /adapters/{adapter}/rebase" in refused["detail"]
            assert names[0] in refused["detail"]
        moved = after.call("POST", "/adapters/long/rebase", json={"backbone": names[0]})
        assert (moved["version"], moved["live"]) == (2, True)
        assert after.predict("long", asked)["predictions"][0]["label"] in ("a", "b")
        after.adapt("long", [{**image(tiny_backbones.picture(77, (160, 40))), "label": "a"}])
        assert after.code(
            "POST", "/predict", 409, json={"adapter": "long", "version": 1, "inputs": asked}
        ) == ("fingerprint_mismatch")
        after.http.close()


def backbones(caller: Caller, name: str) -> list[dict[str, str]]:
    return [one for one in caller.call("GET", "/backbones")["backbones"] if one["name"] == name]

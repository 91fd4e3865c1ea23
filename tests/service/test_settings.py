"""Settings: what is no setting, and what no setting can be."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from service.server.process import explain
from service.settings import Settings, UnknownSetting, unknown_settings
from tests.support.service.commands import topwork

NUMBERS = [name for name, field in Settings.model_fields.items() if field.annotation in (int, float)]


@pytest.mark.parametrize(
    ("slip", "meant"),
    [
        ("TOPWORK_STORE_ULR", "TOPWORK_STORE_URL"),
        ("TOPWORK_DATABSE_URL", "TOPWORK_DATABASE_URL"),
        ("TOPWORK_DATABASEURL", "TOPWORK_DATABASE_URL"),
        ("topwork_admin_kye", "TOPWORK_ADMIN_KEY"),
        ("TOPWORK_MAX_INPUT", "TOPWORK_MAX_INPUTS"),
        ("TOPWORK_HOMES", "TOPWORK_HOME"),
    ],
)
def test_a_slip_in_a_setting_s_name_is_refused(
    monkeypatch: pytest.MonkeyPatch, slip: str, meant: str
) -> None:
    """The store would else be in the home folder, and gone with the container."""
    monkeypatch.setenv(slip, "1")
    with pytest.raises(UnknownSetting, match=f"{slip} is not a setting. Did you mean {meant}?"):
        Settings()


@pytest.mark.parametrize("key", ["short", "é" * 16, "x" * 15 + "\n", "x" * 16 + "\n", " " + "x" * 16])
def test_an_admin_key_that_no_header_can_hold_is_refused(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("TOPWORK_ADMIN_KEY", key)
    with pytest.raises(ValidationError) as caught:
        Settings()
    assert explain(caught.value).startswith("TOPWORK_ADMIN_KEY: ")
    assert key.strip() not in explain(caught.value)


def test_what_else_is_unknown_is_named_and_what_others_set_is_not() -> None:
    known = {f"TOPWORK_{name.upper()}": "x" for name in Settings.model_fields}
    others = {
        "TOPWORK_TEST_REQUIRE": "s3",
        "TOPWORK_URL": "http://localhost",
        "TOPWORK_SERVICE_HOST": "10.0.0.1",
        "TOPWORK_SERVICE_PORT_HTTP": "3000",
        "TOPWORK_PORT": "tcp://10.0.0.1:3000",
        "TOPWORK_PORT_3000_TCP_ADDR": "10.0.0.1",
        "TOPWORK_CANARY_PORT": "tcp://10.0.0.2:3000",
        "PATH": "/bin",
        "NOT_TOPWORK_STORE_ULR": "x",
    }
    assert unknown_settings(known | others) == {}
    asked = {"TOPWORK_PORT": "8080", "TOPWORK_COLOUR": "red", "TOPWORK_MAX_TEXTS": "1"}
    assert unknown_settings(asked) == {
        "TOPWORK_COLOUR": None,
        "TOPWORK_MAX_TEXTS": "TOPWORK_MAX_TEXT_CHARS",
        "TOPWORK_PORT": None,
    }


def test_settings_are_read_before_numpy() -> None:
    program = "import sys, service.settings; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_callback_secrets_are_hidden_and_reach_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = "whsec_" + "A" * 32, "whsec_" + "B" * 32
    monkeypatch.setenv("TOPWORK_CALLBACK_SECRETS", f"{first}, {second}")
    settings = Settings()
    assert settings.worker.callback_secrets == [first, second]
    assert "AAAA" not in repr(settings) + repr(settings.worker)
    monkeypatch.setenv("TOPWORK_CALLBACK_SECRETS", "hunter2")
    with pytest.raises(ValidationError) as caught:
        Settings()
    assert "hunter2" not in explain(caught.value)


@pytest.mark.parametrize("command", [("serve",), ("keys", "list", "acme"), ("doctor",)])
def test_every_command_says_it_in_one_line(tmp_path: Path, command: tuple[str, ...]) -> None:
    environment = {"TOPWORK_HOME": str(tmp_path), "TOPWORK_STORE_ULR": "s3://bucket", "PORT": "0"}
    done = topwork(*command, **environment)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "topwork: TOPWORK_STORE_ULR is not a setting. Did you mean TOPWORK_STORE_URL? Correct it or unset it."
    ]


@pytest.mark.parametrize("name", NUMBERS)
def test_no_number_is_without_bounds(tmp_path: Path, name: str) -> None:
    for value in (10**23, -(10**23), math.inf, math.nan):
        with pytest.raises(ValidationError, match=name):
            Settings.model_validate({"home": tmp_path, name: value})
    assert len(NUMBERS) > 20


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("", "name at least one backbone"),
        ("minilm-l6-v2,minilm-l6-v2", "name at least one backbone, each once"),
        ("a=timm:resnet18,a=timm:resnet34", "Two backbones are called 'a'"),
        ("A=timm:resnet18", "'A' in 'A=timm:resnet18' cannot be the name of a backbone"),
        ("minilm-l6-v2=timm:resnet18", "is the name of a packaged backbone"),
        ("mine=minilm-l6-v2", "Write 'minilm-l6-v2' alone"),
        ("keras:/models/x", "'keras' in 'keras:/models/x' is not a known library. Use timm:<name or folder>"),
        ("resnet18", "'resnet18' is not a backbone"),
    ],
)
def test_wrong_backbones_are_refused_at_start(monkeypatch: pytest.MonkeyPatch, value: str, said: str) -> None:
    monkeypatch.setenv("TOPWORK_BACKBONES", value)
    with pytest.raises(ValidationError) as caught:
        Settings()
    assert explain(caught.value).startswith("TOPWORK_BACKBONES: ")
    assert said in explain(caught.value)


def test_backbones_may_have_short_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOPWORK_BACKBONES", "mine=timm:resnet18, minilm-l6-v2")
    settings = Settings()
    assert settings.backbones == ("mine=timm:resnet18", "minilm-l6-v2")
    assert settings.worker.backbones == settings.backbones

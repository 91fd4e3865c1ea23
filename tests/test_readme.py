"""The README's commands, run as they stand against a running service, and their output beside what it prints.

How to write a block that this test runs: fence it as `console`; lines that begin with `$ ` are commands,
the lines after one are its output. A command goes on over lines that end with a backslash, and inside
quotes. Commands run in order in one bash shell, in the folder of the repository; http://127.0.0.1:3000 is
where the service is. `make` targets are not run, but must be there. Output that is JSON is compared as
JSON: what is printed must be in the answer, keys left out of the README do not matter, numbers with a
fraction may differ by 0.05, `…` stands for anything, and at the end of a list for more of it. Other output
is compared by line, numbers aside, `…` again for anything.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic.fields import FieldInfo

from benchmarks.harness.service_process import ROOT, Serving
from service.settings import Settings

ADDRESS = "http://127.0.0.1:3000"
MARK = "--- the command ended with "


def commands(text: str) -> Iterator[tuple[str, str]]:
    """(command, expected output) of every console block."""
    for block in re.findall(r"^```console\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        command: list[str] = []
        output: list[str] = []
        for line in block.splitlines():
            if line.startswith("$ "):
                if command:
                    yield "\n".join(command), "\n".join(output)
                command, output = [line.removeprefix("$ ")], []
            elif command and not output and unfinished("\n".join(command)):
                command.append(line.removeprefix("> "))
            else:
                output.append(line)
        if command:
            yield "\n".join(command), "\n".join(output)


def unfinished(command: str) -> bool:
    if command.endswith("\\"):
        return True
    if "<<'EOF'" in command:
        return not command.endswith("\nEOF")
    try:
        shlex.split(command)
    except ValueError:
        return True
    return False


def as_json(text: str) -> Any:
    """The value of JSON with `…` in places, or None for what is no JSON."""
    text = re.sub(r"\{\s*…\s*\}", '{"…": "…"}', text)
    text = re.sub(r",\s*…\s*\}", "}", text)
    text = re.sub(r"(?<=[\[:,\s])…(?=\s*[,\]}\n]|$)", '"…"', text)
    try:
        return json.loads(text)
    except ValueError:
        return None


def differences(expected: Any, actual: Any, path: str = "") -> list[str]:
    """The differences between the answer and the README."""
    if expected == "…":
        return []
    if isinstance(expected, dict) and isinstance(actual, dict):
        found = []
        for key, value in expected.items():
            if key != "…":
                found += (
                    differences(value, actual[key], f"{path}/{key}")
                    if key in actual
                    else [f"{path}/{key} is missing"]
                )
        return found
    if isinstance(expected, list) and isinstance(actual, list):
        if expected and expected[-1] == "…":
            expected, actual = expected[:-1], actual[: len(expected) - 1]
        if len(expected) != len(actual):
            return [f"{path}: {len(expected)} items in the README, {len(actual)} in the answer"]
        pairs = enumerate(zip(expected, actual, strict=True))
        return [
            each for number, (one, other) in pairs for each in differences(one, other, f"{path}/{number}")
        ]
    if isinstance(expected, float) and isinstance(actual, int | float) and not isinstance(actual, bool):
        return (
            []
            if abs(expected - actual) <= 0.05
            else [f"{path}: {expected} in the README, {actual} in the answer"]
        )
    if isinstance(expected, str) and "…" in expected and isinstance(actual, str):
        return (
            []
            if re.fullmatch(pattern(expected), actual)
            else [f"{path}: {actual!r} is not like {expected!r}"]
        )
    return [] if expected == actual else [f"{path}: {expected!r} in the README, {actual!r} in the answer"]


def pattern(line: str) -> str:
    """A regular expression for a line of output: any number for a number, anything for `…`."""
    parts = re.split(r"(…|\d+(?:\.\d+)?)", line.strip())
    return "".join(
        ".*" if part == "…" else r"\d+(?:\.\d+)?" if part[:1].isdigit() else re.escape(part) for part in parts
    )


def compare(expected: str, actual: str) -> list[str]:
    value = as_json(expected)
    if value is not None:
        try:
            return differences(value, json.loads(actual))
        except ValueError:
            return [f"no JSON: {actual}"]
    lines = [line.strip() for line in actual.splitlines()]
    return [
        f"no line of the output is like {line!r}:\n{actual}"
        for line in expected.splitlines()
        if line.strip() and not any(re.fullmatch(pattern(line), other) for other in lines)
    ]


class Shell:
    """One bash in which all commands run, so that variables and folders stay."""

    def __init__(self, folder: Path) -> None:
        self._process = subprocess.Popen(
            ["bash", "--noprofile", "--norc"],
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, command: str) -> tuple[int, str]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{command}\nprintf '\\n%s%d\\n' {shlex.quote(MARK)} $?\n")
        self._process.stdin.flush()
        lines: list[str] = []
        for line in self._process.stdout:
            if line.startswith(MARK):
                return int(line.removeprefix(MARK)), "".join(lines).strip()
            lines.append(line)
        raise AssertionError(f"the shell ended after {command!r}: {lines}")

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()


@pytest.mark.parametrize("page", ["README.md", "docs/tutorial/first-classifier.md"])
def test_the_commands_print_what_the_page_says(page: str, tmp_path: Path) -> None:
    found = list(commands((ROOT / page).read_text()))
    assert any("/adapt" in command for command, _ in found), "no adapt in the page"
    assert any("/predict" in command for command, _ in found), "no predict in the page"
    wrong = []
    with Serving(tmp_path / "home") as running:
        shell = Shell(ROOT)
        try:
            for command, expected in found:
                if command.startswith("make "):
                    planned = subprocess.run(
                        ["make", "-n", *shlex.split(command)[1:]], cwd=ROOT, capture_output=True
                    )
                    assert planned.returncode == 0, f"{command}: {planned.stderr.decode()}"
                    continue
                status, output = shell.run(command.replace(ADDRESS, running.url))
                assert status == 0, f"{command}\n{output}"
                wrong += [
                    f"{command}\n    {each}"
                    for each in compare(expected, output.replace(running.url, ADDRESS))
                ]
        finally:
            shell.close()
    assert not wrong, "\n".join(wrong)


def default_of(field: FieldInfo) -> str:
    """A setting's default as its environment variable would say it, in backticks; empty for none."""
    value = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, tuple):
        value = ",".join(value)
    if isinstance(value, float):
        value = f"{value:g}"
    if value in (None, {}, ""):
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def test_the_settings_are_the_documents() -> None:
    documents = (ROOT / "docs" / "reference" / "settings.md").read_text()
    rows = [
        f"| `TOPWORK_{name.upper()}` | {default_of(field)} | {field.description} |"
        for name, field in Settings.model_fields.items()
    ]
    assert not [row for row in rows if row not in documents]


def test_every_make_target_is_explained() -> None:
    readme = (ROOT / "README.md").read_text() + (ROOT / "benchmarks" / "README.md").read_text()
    targets = re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert targets
    assert not [target for target in targets if f"make {target}" not in readme]


def test_the_comparison_sees_a_difference() -> None:
    assert (
        compare(
            '{"a": 1, "b": [1.0, …], "c": …, "d": {…}}', '{"a": 1, "b": [1.04, 7], "c": 3, "d": {}, "e": 5}'
        )
        == []
    )
    assert compare('{"a": "x…", "b": 2, …}', '{"a": "xyz", "b": 2, "c": 3}') == []
    assert compare('{"a": 1}', '{"a": 2}')
    assert compare('{"a": 0.9}', '{"a": 0.8}')
    assert compare('{"a": [1]}', '{"a": [1, 2]}')
    assert compare('{"a": 1}', '{"b": 1}')
    assert compare("ready at …", "ready at http://x")[:1] == []
    assert compare("20 images", "21 images") == []
    assert compare("20 images", "no images")

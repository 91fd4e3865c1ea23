"""The container of a one-stage Dockerfile: its environment, user, volumes and commands."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

# Folders in the image's BentoML home. BentoML makes missing ones at every start.
STORE_FOLDERS = ("bentos", "envs", "tmp")

_VARIABLE = re.compile(r"\$\{?(\w+)\}?")


@dataclass
class Container:
    """As `docker run` of the image starts it. runs: the commands of the build. check: of HEALTHCHECK."""

    base: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    runs: list[str] = field(default_factory=list)
    volumes: list[str] = field(default_factory=list)
    user: str = "root"
    folder: str = "/"
    entrypoint: list[str] = field(default_factory=list)
    arguments: list[str] = field(default_factory=list)
    check: list[str] = field(default_factory=list)


def read(dockerfile: Path, base: dict[str, str]) -> Container:
    """The container of a Dockerfile whose base image has this environment.

    A variable means what ENV says, and only where ENV says nothing what ARG does: so do all builders.
    """
    found = Container(environment=dict(base))
    arguments: dict[str, str] = {}

    def value(text: str) -> str:
        return _VARIABLE.sub(lambda match: {**arguments, **found.environment}.get(match[1], ""), text)

    content = re.sub(r"^#.*\n", "", dockerfile.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    for line in filter(None, map(str.strip, content.splitlines())):
        instruction, _, rest = line.partition(" ")
        match instruction:
            case "FROM":
                assert not found.base, "one stage"
                found.base = rest.split()[0]
            case "ARG":
                name, _, default = rest.partition("=")
                arguments[name] = value("".join(shlex.split(default)))
            case "ENV":
                pairs = [pair.partition("=") for pair in shlex.split(rest)]
                found.environment |= {name: value(given) for name, _, given in pairs}
            case "RUN":
                found.runs.append(rest.strip())
            case "VOLUME":
                found.volumes.append(value(rest))
            case "USER":
                found.user = value(rest)
            case "WORKDIR":
                found.folder = value(rest)
            case "ENTRYPOINT":
                found.entrypoint = json.loads(rest)
            case "CMD":
                found.arguments = json.loads(rest)
            case "HEALTHCHECK":
                found.check = json.loads(rest.partition("CMD ")[2])
            case _:
                assert instruction in {"COPY", "EXPOSE"}, line
    return found

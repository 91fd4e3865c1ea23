"""`topwork plan`: how backbones run on this machine, as it was measured, or measured anew."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models.runtime.autotune import MeasuredPlan
    from service.settings import Settings

COMMANDS = ("plan",)


def add_commands(commands: Any) -> None:
    """Add `plan` to the command line."""
    plan = commands.add_parser("plan", help="show how backbones run here, a line of JSON each")
    plan.add_argument("backbone", nargs="*", help="names (default: those of TOPWORK_BACKBONES)")
    plan.add_argument(
        "--measure", action="store_true", help="measure anew; a service takes it when it starts again"
    )


def run(options: argparse.Namespace) -> int:
    """Run the command and return the exit status. Raises our own errors, which say what is wrong."""
    from models.priority import NICENESS
    from service.settings import Settings, serving_environment

    # numpy must be imported after this, because its threads keep the priority that they start with.
    for name, value in serving_environment().items():
        os.environ.setdefault(name, value)
    if options.measure:
        os.nice(NICENESS)
    settings = Settings()
    for name in options.backbone or settings.backbones:
        found = _plan(settings, name, measure=options.measure)
        print(json.dumps({"backbone": name, **_told(found)}), flush=True)
    return 0


def _plan(settings: Settings, name: str, *, measure: bool) -> MeasuredPlan | None:
    from models.model_store import find
    from models.survey import known_plan, survey

    folder = find(name)
    if folder is None:
        from service.composition import NotExported

        raise NotExported(name)
    way = survey if measure else known_plan
    return way(folder, device=settings.device, threads=settings.usable_threads)


def _told(found: MeasuredPlan | None) -> dict[str, Any]:
    if found is None:
        return {"plan": None, "confirmed": False}
    return {**asdict(found), "confirmed": found.confirmed}

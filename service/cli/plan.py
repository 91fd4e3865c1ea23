"""`topwork plan`: how backbones run on this machine, as measured before or measured now."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.cli.console import show

if TYPE_CHECKING:
    from models.runtime.autotune import MeasuredPlan
    from service.settings import Settings


def plan(
    backbones: Annotated[
        list[str] | None,
        typer.Argument(help="Names of backbones. [default: those of TOPWORK_BACKBONES]"),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure again. A service uses the result from its next start.")
    ] = False,
) -> None:
    """Show how backbones run on this machine, one line of JSON each."""
    from models.priority import NICENESS
    from models.sources.source import entry_of, parse_source
    from service.settings import read_settings

    settings = read_settings()
    if measure:
        # numpy must be imported after this, because its threads keep the priority that they start with.
        os.nice(NICENESS)
    for name in backbones or settings.backbones:
        entry = entry_of(name, settings.backbones)
        found = _plan(settings, entry, measure=measure)
        show({"backbone": parse_source(entry).name, **_described(found)})


def _plan(settings: Settings, entry: str, *, measure: bool) -> MeasuredPlan | None:
    from models.store.exports import find
    from models.survey import known_plan, survey

    folder = find(entry)
    if folder is None:
        from service.composition import NotExported

        raise NotExported(entry)
    way = survey if measure else known_plan
    return way(folder, device=settings.device, threads=settings.usable_threads)


def _described(found: MeasuredPlan | None) -> dict[str, Any]:
    if found is None:
        return {"plan": None, "confirmed": False}
    return {**asdict(found), "confirmed": found.confirmed}

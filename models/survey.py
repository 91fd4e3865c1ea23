"""Measures how a backbone runs best on this machine, and keeps what was measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from models.feeds import dummy_input, feed_of, graph_of, spec_for
from models.runtime import driver
from models.runtime.autotune import (
    BATCHES,
    BATCHES_ON_GPU,
    ExecutionPlan,
    MeasuredPlan,
    Run,
    is_quiet,
    keep_plan,
    measure,
    measure_on_gpu,
    read_plan,
    ways_on_gpu,
)
from models.runtime.session import GPU_ADVICE, Device, DeviceUnavailable, open_session
from models.runtime.trial import try_out
from models.spec import HALF_FILE, OUTPUT_NAME, BackboneSpec


def planned(export: Path, *, device: Device, threads: int) -> MeasuredPlan:
    """Return the fastest plan for the export on this machine, with this total number of threads.

    Measures if there is no stored result, or if that result is unconfirmed and the machine is quiet now.
    Raises CorruptExport, DeviceUnavailable.
    """
    found = known_plan(export, device=device, threads=threads)
    if found is None or (not found.confirmed and is_quiet()):
        return survey(export, device=device, threads=threads)
    return found


def known_plan(export: Path, *, device: Device, threads: int) -> MeasuredPlan | None:
    """Return the stored measurement for this machine, None if there is none. Raises as `planned` does."""
    spec = spec_for(export, device, verify=False)
    return read_plan(export, ExecutionPlan.usual(spec.kind, device, threads), device)


def survey(export: Path, *, device: Device, threads: int) -> MeasuredPlan:
    """Measure now; return and store the new result unless the stored one is more reliable.

    A confirmed new result always replaces the stored one. Raises as `planned` does.
    """
    spec = spec_for(export, device, verify=False)
    usual = ExecutionPlan.usual(spec.kind, device, threads)
    before = read_plan(export, usual, device)
    found = (_measure if device == "cpu" else _measure_on_gpu)(export, spec, usual)
    if before is not None and not found.confirmed and before.doubt < found.doubt:
        return before
    keep_plan(export, usual, device, found)
    return found


def _measure(export: Path, spec: BackboneSpec, usual: ExecutionPlan) -> MeasuredPlan:
    def open_run(count: int) -> Run:
        session = open_session(
            graph_of(export, spec), device="cpu", threads=count, one_shape=spec.kind == "image"
        )
        return lambda feed: session.run([OUTPUT_NAME], feed)

    blank = dummy_input(spec)
    return measure(usual, BATCHES[spec.kind], open_run, lambda count: feed_of(spec, [blank] * count))


def _measure_on_gpu(export: Path, spec: BackboneSpec, usual: ExecutionPlan) -> MeasuredPlan:
    if driver.gpu_name() is None:
        raise DeviceUnavailable(GPU_ADVICE)
    ways = ways_on_gpu(usual, (export / HALF_FILE).exists(), spec.kind == "image")
    batches = BATCHES_ON_GPU[spec.kind]
    # Plans are opened for the largest batch, so that each batch tried is a single run.
    ways = tuple(replace(way, batch=max(batches)) for way in ways)
    return measure_on_gpu(usual, ways, batches, lambda way: try_out(export, way, (1, *batches)))

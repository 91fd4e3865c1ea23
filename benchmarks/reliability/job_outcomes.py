"""What became of jobs whose workers and service were killed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from benchmarks.reliability.kill import Found

Json = dict[str, Any]


@dataclass
class Outcomes(Found):
    """Findings of a run."""

    worker_kills: int = 0
    server_kills: int = 0
    attempts_cut: int = 0
    during_a_submission: int = 0
    answers_lost: int = 0
    states: dict[str, int] = field(default_factory=dict)
    succeeded_later: int = 0
    attempts: int = 0
    uploaded_examples: int = 0
    partial_checkpoints: int = 0
    without_one_outcome: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    failed_otherwise: list[str] = field(default_factory=list)
    numbers_twice: list[str] = field(default_factory=list)
    nobodys_versions: list[str] = field(default_factory=list)
    unusable: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    checkpoints_left: list[str] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, int]:
        """See Found.counts."""
        return {**super().counts, **dict(sorted(self.states.items()))}

    @property
    def failures(self) -> dict[str, list[str]]:
        """See Found.failures."""
        return {
            **super().failures,
            "jobs without exactly one outcome": self.without_one_outcome,
            "outcomes that changed": self.changed,
            "failed but for exhausted attempts": self.failed_otherwise,
            "versions that two jobs name": self.numbers_twice,
            "versions that no job names": self.nobodys_versions,
            "versions that are not there or do not predict": self.unusable,
            "submissions or cancels refused": self.refused,
            "checkpoints of ended jobs left": self.checkpoints_left,
        }


def judge(job: Json, found: Outcomes) -> None:
    """Record whether an ended job has the one outcome that it must have."""
    state, made, code = job["state"], job["version"] is not None, (job["error"] or {}).get("code")
    # A fine-tune that found nothing better has made no version.
    done = made or (job["progress"] or {}).get("outcome") == "no_better"
    whole = {"succeeded": done and not code, "failed": code and not made, "cancelled": not (made or code)}
    if not whole.get(state, False):
        found.without_one_outcome.append(str(job))
    if state == "failed" and code != "attempts_exhausted":
        found.failed_otherwise.append(str(job))
    ended = f"{job['kind']} {state}" + (f": {code}" if code else "")
    found.states[ended] = found.states.get(ended, 0) + 1
    found.attempts += job["attempt"]
    found.succeeded_later += state == "succeeded" and job["attempt"] > 1

"""The reference of errors has exactly the codes that the code knows, with their statuses."""

from __future__ import annotations

import ast
import asyncio
import re
from collections import defaultdict
from pathlib import Path

from adapters.adaptation.commands import ContractChanged
from adapters.adaptation.rollback import CannotRestore
from adapters.examples.meanings import LabelsInvalid
from adapters.examples.upload import BadUpload
from adapters.jobs.submission import CannotTune
from models.errors import CodedError
from service.api.operations import PageEndpoints
from service.errors import STATUSES, TYPE_PREFIX, problem_body
from tests.support.domain_errors import DOMAIN_ERRORS

PAGE = Path("service/api/errors.md")
# Calls whose first word in snake case is a code, in any layer.
_MAKERS = {cls.__name__ for cls in DOMAIN_ERRORS if issubclass(cls, CodedError)} | {
    "Fault",
    "Problem",
    "PydanticCustomError",
    "_Refusal",
    "_check_name",
    "_failed",
    "_refusal",
    "_reject",
}
_JOBS = Path("adapters/jobs")  # an error there ends a job, and is not an answer, but in the submission
_CODE = re.compile(r"[a-z]+(_[a-z0-9]+)+")
# One word, put together from parts, in a variable, or made from the phrase of a status.
_OTHERS: dict[str, set[int]] = {
    "invalid_json": {400},
    # A label in `labels` or `weights` is checked like an example's label.
    "label_invalid": {422},
    "label_missing": {422},
    "label_too_long": {422},
    "method_not_allowed": {405},
    "not_found": {404},
    "overloaded": {429},
    "target_missing": set(),
    "too_many_streams": {429},
    "too_many_uploads": {429},
    "unauthorized": {401},
    "unknown_parameter": set(),
}
# These errors have no kind and end jobs. Other errors without a kind are for operators: no answer has a code.
_OF_JOBS = {"Diverged", "ExportRefused", "ExportFailed", "NoSuchResources"}


def documented() -> dict[str, set[int]]:
    """The statuses of each code on the page."""
    entries = re.findall(r"^### (\S+)\n\n\*\*([^*]+)\.\*\* \S", PAGE.read_text(), re.MULTILINE)
    return {code: {int(number) for number in re.findall(r"\d+", where)} for code, where in entries}


def known() -> dict[str, set[int]]:
    """The statuses of each code in the source; none for the codes of single items and of jobs."""
    found: dict[str, set[int]] = defaultdict(set)
    for code, statuses in _OTHERS.items():
        found[code] |= statuses
    kinds = {
        cls: {status for kind, status in STATUSES.items() if issubclass(cls, kind)} for cls in DOMAIN_ERRORS
    }
    for cls, statuses in kinds.items():
        if not issubclass(cls, CodedError) and (statuses or cls.__name__ in _OF_JOBS):
            found[cls.code].update(statuses)
    # An item alone in its request is a 422, which the page says once for all of them.
    coded = (BadUpload, CannotRestore, CannotTune, ContractChanged, LabelsInvalid)
    of_several = {cls.__name__: kinds[cls] for cls in coded}
    for layer in ("service", "adapters", "models"):
        for path in Path(layer).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and (name := ast.unparse(node.func)) in _MAKERS:
                    words = [one.value for one in node.args if isinstance(one, ast.Constant)]
                    statuses = {word for word in words if isinstance(word, int) and name != "Fault"}
                    if path.parent != _JOBS or path.name == "submission.py":
                        statuses |= of_several.get(name, set())
                    if code := next((w for w in words if isinstance(w, str) and _CODE.fullmatch(w)), ""):
                        found[code] |= statuses
    return dict(found)


def test_the_page_has_every_code_and_no_other() -> None:
    assert set(documented()) == set(known())


def test_the_page_has_the_statuses() -> None:
    page = documented()
    wrong = {code: (page[code], statuses) for code, statuses in known().items() if page[code] != statuses}
    assert not wrong


def test_the_type_of_a_problem_leads_to_its_entry() -> None:
    page = bytes(asyncio.run(PageEndpoints().errors()).body).decode()
    for code in documented():
        link = problem_body(404, code, "", "r")["type"]
        assert link == f"{TYPE_PREFIX}{code}"
        assert f'id="{link.partition("#")[2]}"' in page

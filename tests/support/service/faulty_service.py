"""A service with tiny backbones whose runs a test can have hang, die or go wrong, from outside its code."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from benchmarks.harness.service_process import Serving
from tests.support.models import tiny_backbones

# Installed in every Python process of the service by the name that Python looks for at its start. A file with
# the name of a fault, made by the test, is taken by the first run of a batcher that finds it.
_SITE = """
import importlib.abc
import importlib.util
import json
import os
import sys
import threading
import time

FOLDER = os.environ.get("TEST_FAULTS", "")
CONSTANTS = json.loads(os.environ.get("TEST_CONSTANTS", "{}"))


def asked(fault, kind):
    path = os.path.join(FOLDER, fault + "-" + kind)
    try:
        os.rename(path, path + ".taken")
    except FileNotFoundError:
        return False
    return True


class Session:
    def __init__(self, session):
        self._session = session
        self._kind = "image" if session.get_inputs()[0].name == "rgb" else "text"

    def __getattr__(self, name):
        return getattr(self._session, name)

    def run(self, *arguments):
        thread = threading.current_thread()
        if thread.name.endswith(("-predict", "-bulk")):
            if asked("hang", self._kind) or (thread.name.endswith("-bulk") and asked("hang", "bulk")):
                time.sleep(100_000)
            if asked("die", self._kind):
                raise SystemExit
            if asked("lock", self._kind):
                thread._target.__self__._lock.acquire()
                time.sleep(100_000)
        found = self._session.run(*arguments)
        if os.path.exists(os.path.join(FOLDER, "wrong-" + self._kind)):
            found[0] = found[0] + 1
        return found


def break_preparing(preprocessor):
    prepare = preprocessor.__call__

    def call(self, *arguments):
        if threading.current_thread().name.endswith("-predict") and asked("prepare", "image"):
            time.sleep(100_000)
        return prepare(self, *arguments)

    preprocessor.__call__ = call


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name not in ("models.runtime.session", "models.preprocess.image") and name not in CONSTANTS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        sys.meta_path.insert(0, self)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            vars(module).update(CONSTANTS.get(name, {}))
            if name == "models.runtime.session":
                opened = module.open_session
                module.open_session = lambda *inputs, **options: Session(opened(*inputs, **options))
            if name == "models.preprocess.image":
                break_preparing(module.ImagePreprocessor)

        spec.loader.exec_module = exec_module
        return spec


if FOLDER:
    sys.meta_path.insert(0, Finder())
"""

KINDS = {"image": tiny_backbones.IMAGE_NAME, "text": tiny_backbones.TEXT_NAME}


Constants = Mapping[str, Mapping[str, float]]
"""Values by module and name: shorter times than those that the service has, where a test has no patience."""


def environment(folder: Path, constants: Constants | None = None) -> dict[str, str]:
    """Variables of a service that serves the tiny backbones, and looks for faults in the folder `faults`."""
    for name in ("site", "faults"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "site" / "sitecustomize.py").write_text(_SITE)
    names = tiny_backbones.install(folder / "bentoml", measured=True)
    path = os.pathsep.join(filter(None, [str(folder / "site"), os.environ.get("PYTHONPATH")]))
    return {
        "PYTHONPATH": path,
        "TEST_FAULTS": str(folder / "faults"),
        "TEST_CONSTANTS": json.dumps(constants or {}),
        "BENTOML_HOME": str(folder / "bentoml"),
        "BENTOML_DO_NOT_TRACK": "true",
        "TOPWORK_BACKBONES": ",".join(names),
    }


class Breaking(Serving):
    """A running service that can be broken."""

    def __init__(self, folder: Path, constants: Constants | None = None) -> None:
        """Returns once the service is ready."""
        self.faults = folder / "faults"
        super().__init__(folder / "home", environment=environment(folder, constants))

    def ask(self, fault: str, kind: str) -> None:
        """Has the next run of the batcher of this kind hang, die, or keep its lock; `wrong` stays. `prepare`
        hangs before the run, while an image is prepared.

        Of the kind `bulk`, which can only hang, is what is embedded for adapts and uploads.
        """
        (self.faults / f"{fault}-{kind}").touch()

    def taken(self, fault: str, kind: str) -> bool:
        """True once the fault has happened."""
        return (self.faults / f"{fault}-{kind}.taken").exists()

    def relieve(self, fault: str, kind: str) -> None:
        """Asks for it no more."""
        (self.faults / f"{fault}-{kind}").unlink()

    def child(self, module: str) -> int:
        """The process that runs a module of ours."""
        (found,) = [
            pid
            for pid in self.group()
            if f"\0{module}\0".encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        return found

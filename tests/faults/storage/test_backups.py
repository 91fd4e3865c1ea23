"""Backups of a service under load: each one restored is whole, and answers as the service did."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from adapters.maintenance.backup import backup
from adapters.maintenance.doctor import Doctor
from adapters.maintenance.restore import restore
from adapters.registry.database import Database
from adapters.storage.open import open_store
from benchmarks.harness.service_process import Serving
from tests.faults import times
from tests.support.service.client import Caller, image, pictures, reviews, same

QUESTIONS = ["a wonderful evening", "dull from start to end", "the weather is fine"]
TENANT = "backed-up"
BUSY = 3


class Load:
    """Adapts, removes, deletes and predicts until it is stopped. statuses: of all answers."""

    def __init__(self, url: str) -> None:
        self.statuses: set[int] = set()
        self.rounds = [0] * BUSY
        self.failures: list[BaseException] = []
        self._url = url
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(place, work))
            for place, work in enumerate((self._teach, self._teach_and_remove, self._predict))
        ]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, place: int, work: Callable[[Caller, int], None]) -> None:
        caller = Caller(self._url, TENANT)
        with caller.http:
            caller.http.event_hooks["response"] = [lambda answer: self.statuses.add(answer.status_code)]
            try:
                while not self._stop.is_set():
                    work(caller, self.rounds[place])
                    self.rounds[place] += 1
            except BaseException as error:
                self.failures.append(error)

    def _teach(self, caller: Caller, number: int) -> None:
        name = f"taught{number % 3}"
        for count in (3, 5, 6):
            caller.adapt(name, reviews(count), promote="always")
        if number % 2:
            caller.call("DELETE", f"/adapters/{name}")

    def _teach_and_remove(self, caller: Caller, number: int) -> None:
        caller.adapt("pruned", reviews(4), promote="always")
        caller.call("DELETE", f"/adapters/pruned/examples/good{number % 4}")

    def _predict(self, caller: Caller, number: int) -> None:
        caller.predict("texts", [{"text": text} for text in QUESTIONS])


def test_every_backup_of_a_busy_service_is_whole(serving: Serving, tmp_path: Path) -> None:
    caller = Caller(serving.url, TENANT)
    database = Database(f"sqlite:///{serving.home / 'topwork.db'}")
    store = open_store(str(serving.home / "artifacts"))
    asked = {
        "texts": [{"text": text} for text in QUESTIONS],
        "pictures": [image(b"no picture"), *({"image": one["image"]} for one in pictures(3))],
    }
    with caller.http:
        caller.adapt("texts", reviews())
        caller.adapt("pictures", pictures())
        expected = {name: caller.predict(name, inputs)["predictions"] for name, inputs in asked.items()}
        with Load(serving.url) as load:
            paths = []
            for number in range(times(50, 2)):
                while min(load.rounds) <= number and not load.failures:
                    threading.Event().wait(0.05)
                paths.append(backup(database, store, tmp_path / "backups")[0])
        assert not load.failures, load.failures
        assert min(load.rounds) > 1
        assert load.statuses <= {200}
        for name in ("taught0", "taught1", "taught2", "pruned"):
            caller.http.delete(f"/adapters/{name}")
    database.close()
    for number, path in enumerate(paths):
        home = tmp_path / f"home{number}"
        home.mkdir()
        target, files = Database(f"sqlite:///{home / 'topwork.db'}"), open_store(str(home / "artifacts"))
        restore(path, target, files)
        assert list(Doctor(target, files, lambda name: None).findings()) == []
        target.close()
        with Serving(home) as restored:
            again = Caller(restored.url, TENANT)
            with again.http:
                for name, inputs in asked.items():
                    assert same(again.predict(name, inputs)["predictions"], expected[name])

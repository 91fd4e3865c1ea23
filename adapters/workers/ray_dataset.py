"""A Ray dataset of an upload's embeddings: one task reads the upload, a pool of actors embeds it."""

from __future__ import annotations

import asyncio
import logging
import math
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, Datasource
from ray.data.block import BlockMetadata
from ray.data.datasource import ReadTask

from adapters.examples.target import input_digest
from adapters.examples.upload import UploadLimits
from adapters.examples.upload_forms import records
from adapters.jobs.config import WorkerConfig
from adapters.logs import configure_logging
from adapters.processes.export import ensure_exported
from adapters.registry.jobs import upload_of
from adapters.registry.records import AdapterRecord, JobRecord
from adapters.storage.open import open_store
from models.backbone import Backbone
from models.preprocess.limits import InputError, InputLimits
from models.sources.source import entry_of
from models.store.exports import find

logger = logging.getLogger("topwork")

_BATCH = 250  # inputs that an actor embeds in one call
# Ray cuts its blocks at this size, and joins small ones up to a batch.
_BLOCK_BYTES = 64 << 10
_SURROGATES = "surrogatepass"  # a text may hold half of a character, as JSON can


def embedded_blocks(
    config: WorkerConfig, adapter: AdapterRecord, job: JobRecord, digests: frozenset[str]
) -> Iterator[pa.Table] | None:
    """Begin to embed the upload's inputs with these digests; return the results, in the upload's order.

    None if no node is free. The columns are digest, embedding (float32 (dim,) as bytes), code and detail
    (strings, of an error, or null), unknown and truncated (booleans, see Embedded). Ray ends what it began
    when the iterator is deleted.
    """
    needed = config.ray_resources
    free = ray.available_resources()
    room = min(math.floor(free.get(name, 0.0) / amount) for name, amount in needed.items())
    # The other half is left to other jobs.
    actors = math.ceil(room / 2)
    if not actors:
        return None
    logger.info("job %s: %d inputs are embedded by %d actors", job.id, len(digests), actors)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.target_max_block_size = _BLOCK_BYTES
    upload = _Upload(config, adapter, job, ray.put(digests))
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    read = ray.data.read_datasource(upload, num_cpus=0, override_num_blocks=1, label_selector=here)
    embedded = read.map_batches(
        _Embed,
        fn_constructor_args=(config, adapter.backbone, adapter.fingerprint),
        batch_size=_BATCH,
        batch_format="pyarrow",
        # While one call embeds, the other gets its inputs, or waits until its results are fetched.
        compute=ActorPoolStrategy(
            min_size=1, max_size=actors, initial_size=actors, max_concurrent_calls_per_actor=2
        ),
        num_cpus=needed["CPU"],
        num_gpus=needed.get("GPU", 0.0),
    )
    blocks: Iterator[pa.Table] = iter(embedded.iter_batches(batch_size=None, batch_format="pyarrow"))
    return blocks


class _Upload(Datasource):  # type: ignore[misc]
    """The inputs of an upload with the given digests, each once, in the upload's order."""

    def __init__(self, config: WorkerConfig, adapter: AdapterRecord, job: JobRecord, digests: Any) -> None:
        super().__init__()
        self._config = config
        self._adapter = adapter
        self._job = job
        self._digests = digests

    def get_name(self) -> str:
        return "Upload"

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        """Return the one task that reads the upload, because a file can only be read from its start."""
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(self._read, unknown)]

    def _read(self) -> Iterable[pa.Table]:
        config, request = self._config, self._job.request
        wanted: set[str] = set(ray.get(self._digests))
        store = open_store(config.store, config.store_options)
        limits = UploadLimits(config.max_upload_examples, _input_limits(config))
        with tempfile.TemporaryFile(prefix="topwork-upload-") as file:
            for part in upload_of(request):
                file.write(store.read(self._job.tenant, self._adapter.uid, part))
            file.seek(0)
            digests: list[str] = []
            inputs: list[bytes] = []
            size = 0
            for record in records(request["form"], file, limits, request.get("columns") or {}):
                value = record.posted.input
                if isinstance(value, InputError) or (digest := input_digest(value)) not in wanted:
                    continue
                wanted.remove(digest)
                digests.append(digest)
                inputs.append(value.encode("utf-8", _SURROGATES) if isinstance(value, str) else value)
                size += len(inputs[-1])
                if len(digests) == _BATCH or size >= _BLOCK_BYTES:
                    yield _inputs_table(digests, inputs)
                    digests, inputs, size = [], [], 0
            if digests:
                yield _inputs_table(digests, inputs)


class _Embed:
    """Embeds batches on a node, with a backbone that is loaded once."""

    def __init__(self, config: WorkerConfig, name: str, fingerprint: str) -> None:
        configure_logging(config.log_format)
        entry = entry_of(name, config.backbones)
        asyncio.run(ensure_exported([entry], lambda: None))
        export = find(entry)
        assert export is not None
        self._backbone = Backbone.open(
            export,
            device="cuda" if config.device == "cuda" else "cpu",
            threads=config.threads,
            limits=_input_limits(config),
        )
        if self._backbone.fingerprint != fingerprint:
            raise RuntimeError(
                f"This node has another export of the backbone {name}: {fingerprint} is asked."
            )

    def __call__(self, batch: pa.Table) -> pa.Table:
        values: list[bytes] = batch["input"].to_pylist()
        texts = self._backbone.spec.kind == "text"
        inputs = [value.decode("utf-8", _SURROGATES) for value in values] if texts else values
        embedded = self._backbone.embed(inputs)
        errors = [embedded.errors.get(place) for place in range(len(inputs))]
        return pa.table(
            {
                "digest": batch["digest"],
                "embedding": pa.array([row.tobytes() for row in embedded.embeddings], pa.binary()),
                "code": pa.array([error and error.code for error in errors], pa.string()),
                "detail": pa.array([error and str(error) for error in errors], pa.string()),
                "unknown": pa.array([place in embedded.unknown for place in range(len(inputs))]),
                "truncated": pa.array([place in embedded.truncated for place in range(len(inputs))]),
            }
        )


def _inputs_table(digests: Sequence[str], inputs: Sequence[bytes]) -> pa.Table:
    return pa.table({"digest": pa.array(digests), "input": pa.array(inputs, pa.large_binary())})


def _input_limits(config: WorkerConfig) -> InputLimits:
    return InputLimits(config.max_image_bytes, config.max_image_pixels, config.max_text_chars)

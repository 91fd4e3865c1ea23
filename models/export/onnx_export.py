"""`python -m models.export [names…]`: torch network → ONNX, parity-checked, into the BentoML model store."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import logging
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models.backbone import Backbone
from models.export.float16 import halve
from models.export.four_bits import quantize_matrices
from models.export.loaders import load_network
from models.export.network import Network
from models.export.quantize import quantize
from models.feeds import PROBE_TEXTS, probe_images
from models.preprocess.pixels import with_byte_input
from models.runtime.cuda import lowest_cosine
from models.sources.source import FORMS, ExportRefused
from models.spec import (
    FLOAT32,
    GRAPH_FILE,
    IDS,
    INT4,
    INT8,
    MASK,
    OUTPUT_NAME,
    PACKAGED,
    PIECES_FILE,
    PIXELS,
    TOKENIZER_FILE,
    BackboneSpec,
    ImageTransform,
    UnknownBackbone,
)
from models.store.classes import write_classes
from models.store.exports import find, find_tag, model_name, tag
from models.store.manifest import write_manifest

logger = logging.getLogger(__name__)

_LARGE_TABLE = 8 << 20  # bytes from which a table also gets a file of its own

# Minimum cosine between an embedding and the reference's. float32 graphs reach 0.9999999. The 8-bit limit
# only detects broken graphs, because heads are fitted on the embeddings of the same graph.
_MIN_COSINE = {FLOAT32: 0.9999, INT4: 0.9999, INT8: 0.9}


def export(entry: str) -> str:
    """Export a backbone, named as in the settings, unless it is stored; return its tag in the model store.

    Several processes may export the same backbone at once. Raises UnknownBackbone, ExportRefused; nothing is
    stored then.
    """
    with _lock(entry):
        present = find_tag(entry)
        if present is not None:
            return present
        network = load_network(entry)
        with tempfile.TemporaryDirectory(prefix="topwork-export-") as scratch:
            folder = Path(scratch) / "export"
            folder.mkdir()
            write(network, folder, half=network.spec.precision == FLOAT32)
            _check(network, folder)
            return _store(entry, network.spec, folder)


def main(arguments: Sequence[str] | None = None) -> int:
    """Export the named backbones that are not stored yet; by default those of a service without settings.

    The exit status is 1 if one of them cannot be exported. The others are exported all the same.
    """
    parser = argparse.ArgumentParser(prog="python -m models.export", description=main.__doc__)
    parser.add_argument(
        "names",
        nargs="*",
        default=["efficientnet-lite0", "minilm-l6-v2"],
        help=f"{', '.join(PACKAGED)}, {FORMS}; in front of the others may be <short name>=",
    )
    status = 0
    for name in parser.parse_args(arguments).names:
        try:
            print(export(name), flush=True)
        except (UnknownBackbone, ExportRefused) as error:
            print(f"{name}: {error}", file=sys.stderr)
            status = 1
    return status


@contextlib.contextmanager
def _lock(entry: str) -> Iterator[None]:
    """Allow one export of a backbone at a time per model store, because BentoML's copy is not atomic."""
    from bentoml._internal.configuration.containers import BentoMLContainer

    store = Path(BentoMLContainer.model_store_dir.get())
    store.mkdir(parents=True, exist_ok=True)
    with (store / f".{model_name(entry)}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _store(entry: str, spec: BackboneSpec, folder: Path) -> str:
    import bentoml
    from bentoml.exceptions import NotFound

    stored = tag(entry, spec)
    with contextlib.suppress(NotFound):
        # An existing model with this tag is an interrupted export; find() would have returned a complete one.
        bentoml.models.delete(stored)
    metadata = {
        "fingerprint": spec.fingerprint,
        "source": spec.source,
        "licence": spec.licence,
        "dim": spec.dim,
    }
    with bentoml.models.create(stored, metadata=metadata) as model:
        shutil.copytree(folder, model.path, dirs_exist_ok=True)
        # BentoML creates a folder that only this user can read, but a container serves as another user.
        Path(model.path).chmod(0o755)
    if find(entry) is None:
        raise ExportRefused(
            f"{stored} was stored but cannot be read again. Check the disk of the model store."
        )
    return stored


def write(network: Network, folder: Path, *, half: bool = False) -> None:
    """Write an export to an empty folder: graph, tokenizer, classifier, manifest. `half`: also a half one."""
    if network.graph is None:
        _write_graph(network, folder / GRAPH_FILE)
    else:
        (folder / GRAPH_FILE).write_bytes(network.graph)
    if network.tokenizer is not None:
        (folder / TOKENIZER_FILE).write_bytes(network.tokenizer)
    if network.pieces is not None:
        (folder / PIECES_FILE).write_bytes(network.pieces)
    if network.classes is not None:
        write_classes(folder, network.classes)
    if network.spec.precision == INT8:
        quantize(folder, network.spec)
    if network.spec.precision == INT4:
        quantize_matrices(folder / GRAPH_FILE)
    complete(folder, network.spec, half=half)


def _write_graph(network: Network, graph: Path) -> None:
    """Convert a torch network to ONNX."""
    import torch

    batch = torch.export.Dim("batch", min=1)
    if isinstance(network.spec.transform, ImageTransform):
        size = network.spec.transform.size
        example: tuple[Any, ...] = (torch.zeros(2, 3, size, size),)
        names, shapes = [PIXELS], ({0: batch},)
    else:
        width = min(16, network.spec.transform.max_tokens)
        example = (torch.ones(2, width, dtype=torch.int64), torch.ones(2, width, dtype=torch.int64))
        text = {0: batch, 1: torch.export.Dim("tokens", min=1, max=network.spec.transform.max_tokens)}
        names, shapes = [IDS, MASK], (text, text)  # type: ignore[assignment]
    with torch.inference_mode(), warnings.catch_warnings():
        # The exporter's warnings are about its internals. _check finds anything that affects embeddings.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network.forward,
            example,
            str(graph),
            input_names=names,
            output_names=[OUTPUT_NAME],
            dynamic_shapes=shapes,
            dynamo=True,
            external_data=False,
            verbose=False,
        )


def complete(folder: Path, spec: BackboneSpec, *, half: bool = False) -> None:
    """Turn a folder with a graph as exported by torch, and a text's tokenizer, into a complete export."""
    if half:
        halve(folder)
    if isinstance(spec.transform, ImageTransform):
        for graph in folder.glob("*.onnx"):
            graph.write_bytes(with_byte_input(graph.read_bytes(), spec.transform))
    write_manifest(folder, spec, _set_tables_aside(folder))


def _set_tables_aside(folder: Path) -> dict[str, str]:
    """Copy large embedding tables to files that sessions can share; return the file names by table."""
    import onnx

    graph = onnx.load(folder / GRAPH_FILE).graph
    readers: dict[str, set[str]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, set()).add(node.op_type)
    tables: dict[str, str] = {}
    for constant in graph.initializer:
        value = onnx.numpy_helper.to_array(constant)
        # Only lookup tables can be shared: each session rearranges the matrices of products anyway.
        if value.nbytes >= _LARGE_TABLE and readers.get(constant.name) == {"Gather"}:
            tables[constant.name] = f"table{len(tables)}.npy"
            np.save(folder / tables[constant.name], value, allow_pickle=False)
    return tables


def _check(network: Network, folder: Path) -> None:
    """Compare the whole path, from bytes or text to embedding, with the network's own library.

    Inputs are run one by one and as a batch, because the graph may have the example's batch size built in.
    Raises ExportRefused.
    """
    samples = probe_images() if network.spec.kind == "image" else PROBE_TEXTS
    reference = network.reference(samples)
    try:
        backbone = Backbone.open(folder)
        prepared = [backbone.preprocess(sample) for sample in samples]
        alone = np.concatenate([backbone.run([one]) for one in prepared])
        together = backbone.run(prepared)
    except Exception as error:
        if network.graph is None:
            raise
        # A graph from another program may have any fault, such as a batch size in an inner node.
        raise ExportRefused(f"its graph does not run on one and on several inputs: {error}") from error
    for kind, embeddings in (("alone", alone), ("together", together)):
        lowest = lowest_cosine(embeddings, reference)
        least = _MIN_COSINE[network.spec.precision]
        if not lowest >= least:
            raise ExportRefused(
                f"its embeddings ({kind}) have cosine {lowest:.6f} to the reference's; "
                f"at least {least} is needed"
            )
    logger.info("%s equals its reference: cosine %.7f", network.spec.name, lowest)


if __name__ == "__main__":
    sys.exit(main())

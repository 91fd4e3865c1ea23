"""The rules that keep the parts apart, read from the source."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("models", "adapters", "service")
# Modules that run in processes of their own.
TORCH = {
    "models/export/__main__.py",
    "models/export/onnx_export.py",
    "models/export/float16.py",
    "models/export/four_bits.py",
    "models/export/packaged/e5.py",
    "models/export/packaged/use.py",
    "models/export/networks/graph_parts.py",
    "models/export/networks/hub.py",
    "models/export/networks/image_networks.py",
    "models/export/loaders.py",
    "models/export/networks/onnx_networks.py",
    "models/export/networks/text_networks.py",
    "models/export/quantize.py",
    "adapters/finetune/checkpoint.py",
    "adapters/finetune/trainer.py",
    "adapters/finetune/pacing.py",
    "adapters/finetune/model.py",
    "adapters/finetune/data.py",
    "adapters/finetune/full_phase.py",
    "adapters/finetune/export.py",
    "adapters/jobs/fine_tune.py",
    "adapters/finetune/vocabulary.py",
    "adapters/jobs/runner.py",
    "adapters/workers/place.py",
    "adapters/workers/ray_place.py",
    "adapters/workers/worker.py",
}
BANNED = re.compile(r"(^|_)(manager|handler|engine|utils?|helpers?|common|misc)(_|$)")


@cache
def modules(*folders: str) -> tuple[Path, ...]:
    return tuple(sorted(path for folder in folders or LAYERS for path in (ROOT / folder).rglob("*.py")))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imports(path: Path, *, at_import: bool = False) -> Iterator[str]:
    """Names of the modules that the file imports;

    Those that importing it imports, where that is asked for.
    """
    pending: list[ast.AST] = [tree(path)]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            assert node.module
            yield node.module
        for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if at_import and (for_types or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            continue
        pending.extend(ast.iter_child_nodes(node))


def importers(*packages: str, at_import: bool = False) -> set[str]:
    return {
        str(path.relative_to(ROOT))
        for path in modules()
        if any(name.split(".")[0] in packages for name in imports(path, at_import=at_import))
    }


def test_the_direction_is_service_adapters_models() -> None:
    for number, layer in enumerate(LAYERS):
        above = set(LAYERS[number + 1 :])
        for path in modules(layer):
            assert not {name.split(".")[0] for name in imports(path)} & above, path


# Each may import those behind it, and those in the same line do not import each other.
LEVELS = {
    "service": (
        ("service.cli",),
        ("service.app",),
        ("service.composition",),
        ("service.api",),
        ("service.components",),
        ("service.monitoring", "service.edge"),
        ("service.payloads", "service.server"),
        ("service.background", "service.errors", "service.settings"),
        ("service.environment",),
    ),
    "adapters": (
        ("adapters.workers",),
        ("adapters.maintenance", "adapters.jobs", "adapters.prediction"),
        ("adapters.adaptation",),
        ("adapters.finetune", "adapters.cache", "adapters.processes"),
        ("adapters.registry", "adapters.probe"),
        ("adapters.heads", "adapters.storage"),
        ("adapters.examples",),
        ("adapters.threads",),
        ("adapters.completion", "adapters.defaults", "adapters.logs", "adapters.redaction", "adapters.turns"),
    ),
    "models": (
        ("models.export", "models.trial_process"),
        ("models.batching", "models.survey"),
        ("models.backbone",),
        ("models.feeds",),
        ("models.runtime",),
        ("models.preprocess",),
        ("models.store",),
        ("models.sources",),
        (
            "models.spec",
            "models.digests",
            "models.protobuf",
            "models.arrays",
            "models.child",
            "models.priority",
        ),
        ("models.errors", "models.digests"),
    ),
}


def part_of(name: str) -> str:
    """The folder or module of a package that a dotted name belongs to."""
    return ".".join(name.split(".")[:2])


@pytest.mark.parametrize("layer", LAYERS)
def test_folders_import_only_what_lies_below_them(layer: str) -> None:
    level = {part: number for number, parts in enumerate(LEVELS[layer]) for part in parts}
    wrong = []
    for path in modules(layer):
        own = part_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for name in imports(path):
            other = part_of(name)
            if other in level and other != own and level.get(own, -1) >= level[other]:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong


@pytest.mark.parametrize("layer", LAYERS)
def test_every_folder_has_its_level_and_at_most_twelve_modules(layer: str) -> None:
    known = {part for parts in LEVELS[layer] for part in parts} | {f"{layer}.__init__"}
    for path in modules(layer):
        assert part_of(".".join(path.relative_to(ROOT).with_suffix("").parts)) in known, path
    for folder in (path for path in (ROOT / layer).rglob("*") if path.is_dir()):
        own = [path for path in folder.glob("*.py") if path.stem not in ("__init__", "__main__")]
        assert len(own) <= 12, folder


@pytest.mark.parametrize("folder", ["tests", "benchmarks"])
def test_folders_of_tests_and_benchmarks_have_at_most_twelve_modules(folder: str) -> None:
    own = [path for path in modules(folder) if path.stem not in ("__init__", "__main__", "conftest")]
    assert not {parent: count for parent, count in Counter(path.parent for path in own).items() if count > 12}


def test_tests_import_no_test_module() -> None:
    for path in modules("tests", "benchmarks"):
        wrong = [name for name in imports(path) if name.rpartition(".")[2].startswith("test_")]
        assert not wrong, f"{path}: {wrong}"


def test_no_module_imports_itself_by_way_of_others() -> None:
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in modules()}
    edges = {
        name: {other for other in _whole_names(path) if other in names and other != name}
        for name, path in names.items()
    }
    done: set[str] = set()

    def walk(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " → ".join([*way[way.index(name) :], name])
        if name not in done:
            for other in sorted(edges[name]):
                walk(other, (*way, name))
            done.add(name)

    for name in sorted(edges):
        walk(name, ())


def _whole_names(path: Path) -> Iterator[str]:
    """The names of imported modules, including those imported from a package."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_the_packages_import_neither_tests_nor_benchmarks() -> None:
    assert not importers("tests", "benchmarks")


def test_only_the_edge_imports_a_web_framework() -> None:
    below = {name for name in importers("fastapi", "starlette", "uvicorn") if not name.startswith("service/")}
    assert not below


def test_bentoml_is_for_the_edge_and_the_model_store() -> None:
    below = {
        name
        for name in importers("bentoml", "_bentoml_sdk", "_bentoml_impl")
        if not name.startswith("service/")
    }
    assert below <= {"models/export/onnx_export.py", "models/store/exports.py"}


def test_only_the_server_folder_knows_the_insides_of_uvicorn_and_bentoml() -> None:
    inside = re.compile(r"uvicorn\.|bentoml\._|_bentoml")
    found = {
        str(path.relative_to(ROOT))
        for path in modules()
        if any(inside.match(name) for name in imports(path)) and path.parent != ROOT / "service" / "server"
    }
    # The folder of BentoML's model store, in which an export takes its lock.
    assert found <= {"models/export/onnx_export.py"}


def test_one_module_opens_sessions() -> None:
    # A GPU's memory is bound to a session that it gives; ONNX Runtime makes the other forms of a graph, too.
    others = {"models/runtime/bound_shape.py", "models/export/float16.py", "models/export/quantize.py"}
    assert importers("onnxruntime") == {"models/runtime/session.py", *others}


def test_only_export_and_training_know_torch_and_onnx() -> None:
    heavy = importers(
        "torch", "torchvision", "timm", "transformers", "sentence_transformers", "onnx", "onnxscript"
    )
    assert heavy <= TORCH
    # An import of one of them imports torch, which no serving module may.
    names = {path.removesuffix(".py").replace("/", ".") for path in TORCH}
    assert {
        str(path.relative_to(ROOT)) for path in modules() if names & set(imports(path, at_import=True))
    } <= TORCH
    assert not importers("sklearn")


def test_what_waits_for_database_or_store_has_threads_of_its_own() -> None:
    """The event loop's default executor computes: what hangs there holds up everything."""
    waits = re.compile(r"registry|_store\b|_jobs\b|_tenants\b|_replies\b|erasures|lease\b")
    for path in modules("service", "adapters"):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "asyncio.to_thread":
                assert not waits.search(ast.unparse(node)), f"{path}:{node.lineno}: {ast.unparse(node)}"


def test_two_modules_know_ray_and_are_imported_where_the_settings_ask_for_it() -> None:
    assert importers("ray") == {"adapters/workers/ray_place.py", "adapters/workers/ray_dataset.py"}
    assert not [
        path for path in modules() if "adapters.workers.ray_place" in set(imports(path, at_import=True))
    ]


def test_only_the_settings_read_the_environment() -> None:
    """Handing the whole environment on to a child, and setting a variable for a library, are not reading."""
    for path in modules():
        if path in (ROOT / "service" / "settings.py", ROOT / "service" / "environment.py"):
            continue
        for node in ast.walk(tree(path)):
            text = ast.unparse(node) if isinstance(node, ast.Subscript | ast.Call | ast.Compare) else ""
            reads = re.search(r"os\.environ(\.get\b|\[)|os\.getenv| in os\.environ", text)
            child = text.startswith(("os.pathsep.join", "asyncio.create_subprocess_exec", "subprocess."))
            assert not reads or child or "PYTHONPATH" in text, f"{path}: {text}"


def test_names_say_what_they_are() -> None:
    for path in modules(*LAYERS, "benchmarks"):
        assert not BANNED.search(path.stem), path
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ClassDef):
                snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", node.name).lower()
                assert not BANNED.search(snake), f"{path}:{node.lineno}: {node.name}"


def test_public_names_say_what_the_signature_cannot() -> None:
    for path in modules():
        if "versions" in path.parts:
            continue
        assert ast.get_docstring(tree(path)), f"{path}: no docstring"
        for node in tree(path).body:
            if (
                isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
                and node.name[0] != "_"
            ):
                assert ast.get_docstring(node), f"{path}:{node.lineno}: {node.name} has no docstring"


def test_nothing_is_unpickled_or_evaluated() -> None:
    for path in modules():
        assert not {name.split(".")[0] for name in imports(path)} & {
            "pickle",
            "joblib",
            "dill",
            "marshal",
            "shelve",
        }
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call):
                call = ast.unparse(node.func)
                assert call not in {"eval", "exec", "os.system"}, f"{path}:{node.lineno}"
                words = {word.arg: ast.unparse(word.value) for word in node.keywords}
                assert words.get("shell") != "True", f"{path}:{node.lineno}"
                if call == "torch.load":
                    assert words.get("weights_only") == "True", f"{path}:{node.lineno}"


@pytest.mark.parametrize(
    "module", ["service.app", "service.composition", "service.api.app", "adapters.processes.fit_client"]
)
def test_importing_the_service_imports_nothing_of_training(module: str) -> None:
    script = f"import sys, {module}; print(*sorted(name for name in sys.modules if '.' not in name))"
    found = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not set(found.stdout.split()) & {
        "torch",
        "torchvision",
        "timm",
        "transformers",
        "sentence_transformers",
        "onnx",
        "onnxscript",
        "sklearn",
        "scipy",
    }

"""The architecture, held by tests: who may import what, and the error tree as it is drawn."""

import ast
import functools
import graphlib
import inspect
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from phi4ray import errors

ROOT = Path(__file__).parents[2]
PRODUCT = ("phi4ray", "cluster", "jobs")
ROOMS = (*PRODUCT, "benchmarks", "examples", "tests", "tools")


def modules(*rooms: str) -> list[str]:
    """Paths below the repository's root, such as `phi4ray/errors.py`."""
    found = (path for room in rooms for path in (ROOT / room).rglob("*.py"))
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


@functools.cache
def parse(module: str) -> ast.Module:
    return ast.parse((ROOT / module).read_text(encoding="utf-8"), module)


def imported_names(tree: ast.Module) -> Iterator[str]:
    """Every name an import statement could bind, at any depth: `from a import b` gives `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{a.name}" for a in node.names)


def importers(package: str, *rooms: str) -> set[str]:
    """The modules of these rooms that import the package or anything in it."""
    return {
        module
        for module in modules(*rooms)
        if any(f"{name}.".startswith(f"{package}.") for name in imported_names(parse(module)))
    }


def test_imports_are_seen_in_every_form() -> None:
    tree = ast.parse("import a.b as c\ndef f():\n    from d import e, f\n    from . import g")
    assert sorted(imported_names(tree)) == ["..g", "a.b", "d.e", "d.f"]


def test_only_the_replica_imports_vllm() -> None:
    rooms = [room for room in ROOMS if room != "benchmarks"]  # where vLLM is the peer
    assert {module.rpartition("/")[0] for module in importers("vllm", *rooms)} == {
        "phi4ray/replica"
    }


def test_only_training_imports_torch_and_transformers() -> None:
    for package in ("torch", "transformers", "tokenizers"):
        found = importers(package, *PRODUCT)
        assert found
        assert {module.rpartition("/")[0] for module in found} == {"phi4ray/train"}, package


@pytest.mark.parametrize(
    ("package", "module"),
    [
        ("peft", "phi4ray/train/adapters.py"),
        ("accelerate", "phi4ray/train/trainer.py"),
        ("auto_round", "phi4ray/train/compress.py"),
        ("compressed_tensors", "phi4ray/train/compress.py"),
        ("datasets", "phi4ray/train/compress.py"),
        ("llmcompressor", "phi4ray/train/compress.py"),
        ("lm_eval", "phi4ray/train/harness.py"),
        ("transformers.Trainer", "phi4ray/train/trainer.py"),
        ("ray.train", "cluster/train.py"),
    ],
)
def test_a_training_library_has_one_importer(package: str, module: str) -> None:
    assert importers(package, *PRODUCT) == {module}


@pytest.mark.slow
def test_what_imports_them_is_imported_only_where_it_is_used() -> None:
    drivers = (
        "phi4ray.train.finetune",
        "phi4ray.train.quantize",
        "phi4ray.train.evaluate",
        "phi4ray.cli",
    )
    heavy = "{'torch', 'transformers', 'peft', 'accelerate', 'vllm', 'lm_eval', 'datasets'}"
    for driver in drivers:
        code = f"import sys, {driver}; print({heavy} & sys.modules.keys())"
        run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert run.stdout == "set()\n", (driver, run.stderr)


def test_what_runs_in_the_quantizers_environment_imports_nothing_of_ours() -> None:
    names = set(imported_names(parse("phi4ray/train/compress.py")))
    assert not {name for name in names if name.split(".")[0] in PRODUCT}


def test_only_the_cluster_imports_ray() -> None:
    rooms = {module.split("/")[0] for module in importers("ray", *ROOMS)}
    assert "cluster" in rooms
    assert rooms <= {"cluster", "benchmarks", "tests"}


@pytest.mark.parametrize("package", ["boto3", "botocore", "pyarrow.fs"])
def test_only_storage_imports_the_object_store_clients(package: str) -> None:
    rooms = [room for room in ROOMS if room != "tests"]  # whose S3 server wants a client
    assert importers(package, *rooms) <= {"phi4ray/storage/s3.py"}


def test_storage_is_where_the_object_store_clients_are() -> None:
    assert importers("boto3", "phi4ray") == {"phi4ray/storage/s3.py"}


@pytest.mark.parametrize(
    ("room", "above"), [("phi4ray", "cluster"), ("phi4ray", "jobs"), ("cluster", "jobs")]
)
def test_imports_never_run_upward(room: str, above: str) -> None:
    assert modules(room)
    assert importers(above, room) == set()


@pytest.mark.parametrize("aside", ["benchmarks", "examples", "tests", "tools"])
def test_the_product_imports_nothing_that_is_not_shipped(aside: str) -> None:
    assert importers(aside, *PRODUCT) == set()


def test_imports_are_absolute() -> None:
    relative = {
        module
        for module in modules(*ROOMS)
        if any(name.startswith(".") for name in imported_names(parse(module)))
    }
    assert relative == set()


def test_imports_run_one_way() -> None:
    named = {module.removesuffix(".py").replace("/", "."): module for module in modules(*PRODUCT)}
    graph = {
        name: {
            other
            for bound in imported_names(parse(module))
            for other in (bound, bound.rpartition(".")[0])
            if other in named
        }
        for name, module in named.items()
    }
    assert "phi4ray.errors" in graph["phi4ray.config"]
    graphlib.TopologicalSorter(graph).prepare()  # CycleError names the cycle


@pytest.mark.parametrize("module", modules(*ROOMS))
def test_a_module_says_what_it_is(module: str) -> None:
    assert ast.get_docstring(parse(module))


def drawn_error_tree() -> dict[str, str | None]:
    """Read the drawing atop `phi4ray.errors`: each error's name, and that of the one above it."""
    parents: dict[str, str | None] = {}
    path: list[str] = []
    drawing = re.compile(r"^ {4}((?:[│ ] {3})*(?:[├└]── )?)(\w+)", re.MULTILINE)
    for branch, name in drawing.findall(inspect.cleandoc(errors.__doc__ or "")):
        depth = len(branch) // 4
        del path[depth:]
        parents[name] = path[-1] if path else None
        path.append(name)
    return parents


ERRORS = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, errors.Phi4rayError)
]


def test_the_error_tree_is_as_drawn() -> None:
    real = {error.__name__: error.__base__.__name__ for error in ERRORS if error.__base__}
    assert drawn_error_tree() == {**real, "Phi4rayError": None}


def test_every_error_is_exported() -> None:
    assert sorted(errors.__all__) == sorted(error.__name__ for error in ERRORS)


@pytest.mark.parametrize("error", ERRORS)
def test_an_error_survives_the_way_between_processes(error: type[errors.Phi4rayError]) -> None:
    sent = error("the bucket is gone: check the URI")
    received = pickle.loads(pickle.dumps(sent))
    assert type(received) is error
    assert str(received) == str(sent) == "the bucket is gone: check the URI"


def test_one_except_clause_catches_every_error() -> None:
    assert {error for error in ERRORS if len(error.__bases__) != 1} == set()

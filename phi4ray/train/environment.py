"""The Python that quantizes: an environment of its own, because pins clash.

llm-compressor 0.14 wants transformers up to 5.17 and compressed-tensors 0.19, where vLLM 0.32 has
compressed-tensors 0.17: whatever is installed last breaks the other.
"""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from filelock import FileLock

from phi4ray.errors import ConfigError

PYTHON = "PHI4RAY_QUANTIZE_PYTHON"
"""Environment variable: a Python that has `REQUIREMENTS`, in place of one made here."""

REQUIREMENTS = ("auto-round>=0.15,<0.17", "llmcompressor>=0.14,<0.15")
"""As the extra `quantize` in pyproject.toml has them."""

_TORCH_INDEX = "https://download.pytorch.org/whl/cpu"


def quantize_python(given: str | None) -> Path:
    """The Python to quantize with: the given one, this one if it can, else one made and kept.

    Raises:
        ConfigError: the given one is none, or no environment can be made.
    """
    if given := given or os.environ.get(PYTHON):
        found = shutil.which(given)
        if found is None:
            raise ConfigError(
                f"{given} is no Python: name one that has {' and '.join(REQUIREMENTS)}"
            )
        return Path(found).absolute()
    if importlib.util.find_spec("llmcompressor") and importlib.util.find_spec("auto_round"):
        return Path(sys.executable)
    return make_environment(Path.home() / ".cache" / "phi4ray" / "environments", REQUIREMENTS)


def make_environment(root: Path, requirements: tuple[str, ...]) -> Path:
    """Make a virtual environment with these packages, once for all processes; its Python.

    A machine whose torch is a CPU build gets the same build: others are gigabytes larger.

    Raises:
        ConfigError: pip fails; the message holds the end of what it said.
    """
    wanted = (*_torch(), *requirements)
    name = hashlib.sha256("\n".join((sys.version, *wanted)).encode()).hexdigest()[:16]
    folder = root / f"quantize-{name}"
    python, ready = folder / "bin" / "python", folder / ".ready"
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if ready.exists():
            return python
        _run([sys.executable, "-m", "venv", "--clear", str(folder)])
        _run([str(python), "-m", "pip", "install", *_index(python), *wanted])
        ready.touch()
    return python


def _torch() -> tuple[str, ...]:
    try:
        found = version("torch")
    except PackageNotFoundError:
        return ()
    return (f"torch=={found}",) if found.endswith("+cpu") else ()


def _index(python: Path) -> tuple[str, ...]:
    """Where the CPU build of torch is, unless pip finds it where it is told to look."""
    if not (torch := _torch()):
        return ()
    command = [str(python), "-m", "pip", "index", "versions", "torch"]
    found = subprocess.run(command, capture_output=True, text=True).stdout
    available = re.search(r"^Available versions: (.*)$", found, re.MULTILINE)
    if available and torch[0].removeprefix("torch==") in available[1].split(", "):
        return ()
    return ("--extra-index-url", os.environ.get("PHI4RAY_TORCH_INDEX", _TORCH_INDEX))


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise ConfigError(
            "the environment for quantizing cannot be made; make one yourself, with "
            f"{' and '.join(REQUIREMENTS)}, and name its Python with --python. "
            f"{' '.join(command[:4])} said:\n{done.stdout[-2000:]}"
        )

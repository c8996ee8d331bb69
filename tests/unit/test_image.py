"""The image: made of what is there, of pinned parts, for the user and the pods that run it."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import phi4ray
from tests.manifests import (
    ROOT,
    clusters,
    container,
    each_overlay,
    groups,
    needs_kustomize,
    overlay,
)

pytestmark = [needs_kustomize, pytest.mark.slow]

DOCKERFILE = (ROOT / "Dockerfile").read_text()


def pinned(target: str) -> dict[str, str]:
    text = (ROOT / "docker" / f"requirements-{target}.txt").read_text()
    return dict(re.findall(r"^([a-z0-9.-]+)==(\S+)$", text, re.MULTILINE))


@pytest.mark.parametrize(
    ("target", "extras"), [("gpu", ("gpu", "stream", "train", "evaluate")), ("cpu", ("cpu",))]
)
def test_the_image_has_all_that_the_package_requires(target: str, extras: tuple[str, ...]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    versions = pinned(target)
    optional = [line for extra in extras for line in project["optional-dependencies"][extra]]
    for line in (*project["dependencies"], *optional):
        requirement = Requirement(line)
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), line
    made = (ROOT / "docker" / f"requirements-{target}.txt").read_text()
    assert tuple(re.findall(r"--extra (\S+)", made)) == extras


def test_the_driver_that_cuda_needs_is_said_where_it_is_installed() -> None:
    assert pinned("gpu")["cuda-toolkit"].startswith("13.")
    for name in ("README.md", "docs/operations.md"):
        text = " ".join((ROOT / name).read_text().split())
        assert "CUDA 13" in text
        assert re.search(r"need\w* an NVIDIA driver of 580 or later", text), name


@each_overlay
def test_images_and_ray_have_the_versions_of_the_package_and_of_the_pins(name: str) -> None:
    target = "cpu" if name.startswith("cpu-") else "gpu"
    for cluster in clusters(overlay(name)):
        assert cluster["rayVersion"] == pinned(target)["ray"]
        for group in groups(cluster):
            assert container(group)["image"].endswith(f":{phi4ray.__version__}-{target}")


def test_the_documented_commands_build_the_images_that_the_manifests_name() -> None:
    for target in ("gpu", "cpu"):
        assert f"--target {target} -t " in DOCKERFILE
        assert f"phi4ray:{phi4ray.__version__}-{target} ." in DOCKERFILE
        assert re.search(rf"^FROM system AS {target}$", DOCKERFILE, re.MULTILINE)


def test_the_image_runs_as_the_user_that_pods_run_as() -> None:
    assert DOCKERFILE.count("USER 1000:1000") == 2
    for cluster in clusters(overlay("h200/service")):
        for group in groups(cluster):
            assert group["template"]["spec"]["securityContext"]["runAsUser"] == 1000


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions and what follows them, on one line each."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", " ")
    lines = (line.split(maxsplit=1) for line in text.splitlines() if line.strip())
    return [(name, " ".join(rest.split())) for name, rest in lines]


def stages() -> dict[str, list[tuple[str, str]]]:
    """The instructions of each stage, its FROM first."""
    found: dict[str, list[tuple[str, str]]] = {}
    for name, rest in instructions():
        if name == "FROM":
            found[rest.split(" AS ")[1]] = []
        if found:
            found[list(found)[-1]].append((name, rest))
    return found


def test_all_that_is_copied_is_there_and_is_sent_to_the_builder() -> None:
    sent = (ROOT / ".dockerignore").read_text()
    copied = [rest.split() for name, rest in instructions() if name == "COPY"]
    sources = [
        source
        for words in copied
        if not words[0].startswith("--from=")
        for source in [word for word in words if not word.startswith("--")][:-1]
    ]
    assert len(sources) >= 8
    for source in sources:
        assert (ROOT / source).exists(), source
        assert f"\n!{Path(source).parts[0]}\n" in sent, source


def test_stages_take_only_from_stages_that_there_are() -> None:
    before: set[str] = set()
    for stage, lines in stages().items():
        for name, rest in lines:
            if name == "FROM":
                base = rest.split(" AS ")[0]
                assert base in before or base.startswith("python:"), base
            for other in re.findall(r"(?<=from=)[a-z-]+", rest):
                assert other in before, other
        before.add(stage)


def test_python_is_pinned_to_the_version_that_the_packages_were_resolved_for() -> None:
    [version] = re.findall(r"^ARG PYTHON_VERSION=(.+)$", DOCKERFILE, re.MULTILINE)
    assert len(Version(version).release) == 3
    for target in ("gpu", "cpu"):
        made = (ROOT / "docker" / f"requirements-{target}.txt").read_text()
        [resolved] = re.findall(r"--python-version (\S+)", made)
        assert version.startswith(f"{resolved}.")


def test_nothing_is_installed_without_a_version() -> None:
    runs = [rest for name, rest in instructions() if name == "RUN" and "pip install" in rest]
    assert len(runs) == 5
    for run in runs:
        command = run.split("pip install ")[1]
        assert "--no-cache-dir" in command
        assert re.search(r"-r requirements|/wheels/|==", command), command
    for target in ("gpu", "cpu"):
        for line in (ROOT / "docker" / f"requirements-{target}.txt").read_text().splitlines():
            assert line.startswith("#") or re.fullmatch(r"[a-z0-9.-]+==[^=\s]+", line), line


@pytest.mark.parametrize("target", ["gpu", "cpu"])
def test_packages_are_a_layer_below_phi4ray_and_all_is_installed_before_the_user(
    target: str,
) -> None:
    lines = [f"{name} {rest}" for name, rest in stages()[target]]
    packages = lines.index(f"COPY --from={target}-packages /venv /venv")
    [ours] = [at for at, line in enumerate(lines) if "/wheels/*.whl" in line]
    user = lines.index("USER 1000:1000")
    assert packages < ours < user
    assert not [line for line in lines[user:] if "install" in line or line.startswith("USER root")]


def test_phi4ray_is_in_the_wheel_that_is_built() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    copied = [rest.split()[0] for name, rest in stages()["wheel"] if name == "COPY"]
    assert {"phi4ray", "cluster", "jobs"} == set(packages) <= set(copied)
    [needed] = [Requirement(line) for line in project["build-system"]["requires"]]
    [used] = re.findall(r"pip install .* hatchling==(\S+)", DOCKERFILE)
    assert needed.specifier.contains(used)

"""Pods of the manifests on this machine: the image's files and the mounts, each at its own path.

A mount namespace stands for a container: `/venv` is the environment that runs the tests, with
phi4ray as a wheel beside it, made as the Dockerfile makes it; volumes are folders. All pods share
this machine's network, so each has an address of 127.0.0.0/8. What an image has beyond (its own
Debian and Python, and the user 1000) is not here.
"""

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import httpx
import psutil
import pytest

from phi4ray.train.tiny import make_tiny_model
from tests.manifests import ROOT, Object, container, of_kind, quantity
from tests.processes import kill_family
from tests.waiting import until

UNSHARE = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "-r"]
needs_namespaces = pytest.mark.skipif(
    shutil.which("unshare") is None
    or subprocess.run([*UNSHARE, "true"], capture_output=True).returncode != 0,
    reason="mount namespaces are not allowed here",
)

# The root of a container, at the folder $1: all of this machine by links, and the mounts of $2
# ("from to" lines) in their places; then $3 is the working directory and the rest is run.
ENTER = r"""
set -e
root=$1 mounts=$2 folder=$3
shift 3
mount -t tmpfs tmpfs "$root"
mkdir "$root/.host"
mount --rbind / "$root/.host"
link() { # a folder of this machine, as links to what it has
    mkdir -p "$root$1"
    for one in $(ls -A "/$1"); do
        [ -e "$root$1/$one" ] || ln -s "/.host$1/$one" "$root$1/$one"
    done
}
printf '%s\n' "$mounts" | while read -r from to; do mkdir -p "$root$to"; done
for at in dev proc sys; do mkdir "$root/$at"; mount --rbind "/$at" "$root/$at"; done
mkdir -p "$root/tmp" "$root/etc" "$root/home"
link ""
for at in etc home; do link "/$at"; done
printf '%s\n' "$mounts" | while read -r from to; do mount --rbind "$from" "$root$to"; done
exec chroot "$root" sh -c 'cd "$0" && exec "$@"' "$folder" "$@"
"""

HEAD, WORKER = "127.0.0.1", "127.0.0.2"
ADDRESS, DASHBOARD = f"{HEAD}:6379", f"http://{HEAD}:8265"
TOKEN = "0123456789abcdef0123456789abcdef"
# Agents of other clusters have the port of KubeRay's probes, on 127.0.0.1 too: pods have another.
AGENT, AGENT_HERE = 52365, 8266


def build_image(folder: Path) -> Path:
    """What the Dockerfile's target `cpu` puts into an image beside the packages."""
    dockerfile = (ROOT / "Dockerfile").read_text()
    stage = dockerfile.split("AS wheel")[1].split("\nFROM ")[0]
    source = folder / "src"
    source.mkdir(parents=True)
    for line in re.findall(r"^COPY (.+)$", stage, re.MULTILINE):
        *names, to = line.split()
        for name in names:
            copy(ROOT / name, source / to if len(names) == 1 else source / to / name)
    [command] = re.findall(r"^RUN (pip wheel .+)$", stage, re.MULTILINE)
    run_pip(command.replace("/wheels", str(folder / "wheels")), source)
    [wheel] = (folder / "wheels").iterdir()
    run_pip(f"pip install --no-deps --no-index --target {folder / 'site'} {wheel}", source)
    home = folder / "home"
    copy(ROOT / "examples", home / "examples")
    make_tiny_model(home / "tiny-phi-4")
    return folder


def copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    else:
        shutil.copy(source, target)


def run_pip(command: str, folder: Path) -> None:
    arguments = shlex.split(command)[1:]
    done = subprocess.run(
        [sys.executable, "-m", "pip", *arguments], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def image_environment(target: str) -> dict[str, str]:
    """The Dockerfile's ENV, of the stage `system` and of a target."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    found: dict[str, str] = {}
    for name in ("system", target):
        stage = re.split(rf"^FROM .* AS {name}$", text, flags=re.MULTILINE)[1].split("\nFROM ")[0]
        for line in re.findall(r"^ENV (.+)$", stage, re.MULTILINE):
            found |= dict(item.split("=", 1) for item in shlex.split(line))
    return {name: value.replace("$PATH", os.defpath) for name, value in found.items()}


class Pod:
    """One pod of a cluster's group, whose commands run in its container."""

    def __init__(
        self,
        image: Path,
        folder: Path,
        objects: list[Object],
        group: Object,
        ip: str,
        cache: Path,
        secrets: Mapping[str, Mapping[str, str]],
        environment: Mapping[str, str],
    ) -> None:
        self.ip, self.group, self.folder = ip, group, folder
        for name in ("root", "tmp"):
            (folder / name).mkdir(parents=True)
        self._ray = container(group)
        mounts = {
            str(Path(sys.prefix)): "/venv",
            str(image / "site"): "/site",
            str(image / "home"): "/home/ray",
            str(folder / "tmp"): "/tmp",
        }
        for path in (os.path.realpath(sys.prefix), sys.base_prefix):
            if path.startswith("/tmp/"):  # which every pod has its own of
                mounts[path] = path
        sources = {one["name"]: one for one in group["template"]["spec"]["volumes"]}
        for mount in self._ray["volumeMounts"]:
            source = sources[mount["name"]]
            if (found := self._volume(source, objects, cache)) is not None:
                mounts[str(found)] = mount["mountPath"]
        self._mounts = "\n".join(f"{path} {to}" for path, to in mounts.items())
        # The later one holds, as in a pod.
        self.environment = {**image_environment("cpu"), "PYTHONPATH": "/site", "HOME": "/home/ray"}
        for one in self._ray["envFrom"]:
            assert one["secretRef"]["optional"] is True
            self.environment |= secrets.get(one["secretRef"]["name"], {})
        self.environment |= {one["name"]: one["value"] for one in self._ray["env"]}
        self.environment |= environment

    def _volume(self, source: Object, objects: list[Object], cache: Path) -> Path | None:
        """Where a volume's files are; None for one that every machine has, or that is empty."""
        match source:
            case {"persistentVolumeClaim": {"claimName": "phi4ray-cache"}}:
                return cache
            case {"configMap": {"name": str(name)}}:
                [settings] = [
                    item
                    for item in of_kind(objects, "ConfigMap")
                    if item["metadata"]["name"] == name
                ]
                path = self.folder / "configmap" / name
                path.mkdir(parents=True)
                for file, text in settings["data"].items():
                    (path / file).write_text(text)
                return path
            case {"emptyDir": {"medium": "Memory"}} | {"secret": {"optional": True}}:
                return None
        raise AssertionError(f"no way to mount {source}")

    def start(self, *command: str) -> psutil.Popen:
        """Start a command in the container; what it says is in the pod's folder."""
        variables = [f"{name}={value}" for name, value in self.environment.items()]
        enter = [*UNSHARE, "sh", "-c", ENTER, "sh", str(self.folder / "root"), self._mounts]
        inside = ["/home/ray", "env", "--ignore-environment", *variables, *command]
        with (self.folder / "log").open("ab") as log:
            return psutil.Popen(
                [*enter, *inside], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env={"PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"},
            )  # fmt: skip

    def run(self, *command: str, timeout_s: float = 60) -> tuple[int, str]:
        """Run a command; gives its exit status and all that it said."""
        before = self.log()
        try:
            code = self.start(*command).wait(timeout_s)
        except psutil.TimeoutExpired:
            raise AssertionError(
                f"not done in {timeout_s} s: {self.log()[len(before) :]}"
            ) from None
        return code, self.log()[len(before) :]

    def log(self) -> str:
        log = self.folder / "log"
        return log.read_text(errors="replace") if log.exists() else ""

    def passes(self, name: str, group: Object | None = None) -> bool:
        """Ask what kubelet asks, and without a token as it does; of another group, if one is named.

        That one starts its pods with the same commands.
        """
        ray = container(group or self.group)
        get = ray[name]["httpGet"]
        ports = {one["name"]: one["containerPort"] for one in ray["ports"]}
        port = ports.get(get["port"], get["port"])
        port = AGENT_HERE if port == AGENT else port
        try:
            return httpx.get(f"http://{self.ip}:{port}{get['path']}", timeout=5).is_success
        except httpx.TransportError:
            return False


class Cluster:
    """The head and one worker of a Ray cluster, started with the commands that KubeRay makes."""

    def __init__(
        self,
        image: Path,
        folder: Path,
        objects: list[Object],
        cluster: Object,
        secrets: Mapping[str, Mapping[str, str]],
    ) -> None:
        # A volume outlives the clusters that claim it: others find there what the first compiled.
        cache = image / "cache"
        cache.mkdir(exist_ok=True)
        assert cluster["authOptions"] == {"mode": "token"}
        added = {
            "RAY_ADDRESS": ADDRESS, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN,
            "RAY_CLUSTER_NAME": "phi4ray-abcde", "RAY_USAGE_STATS_KUBERAY_IN_USE": "1",
        }  # fmt: skip

        def pod(name: str, group: Object, ip: str) -> Pod:
            return Pod(image, folder / name, objects, group, ip, cache, secrets, added)

        self.head = pod("head", cluster["headGroupSpec"], HEAD)
        self.worker = pod("worker", cluster["workerGroupSpecs"][0], WORKER)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Have both pods ready inside the block."""
        processes = []
        try:
            for pod, options in ((self.head, ["--head"]), (self.worker, [f"--address={ADDRESS}"])):
                processes.append(pod.start("ray", "start", *options, *ray_start(pod)))
                until(partial(pod.passes, "livenessProbe"), 120, pod.log)
            yield
        finally:
            for process in processes:
                # Not asked to end, which Ray would do with all its care, one node after another.
                kill_family(process)

    def submit(self, name: str, entrypoint: str) -> tuple[int, str]:
        """Run a job as the submitter's pod does: its shell reads the entrypoint first."""
        submit = f"ray job submit --address {DASHBOARD} --submission-id {name} -- {entrypoint}"
        return self.head.run("bash", "-c", submit, timeout_s=600)


def ray_start(pod: Pod) -> list[str]:
    """The options of `ray start` that KubeRay derives from a group."""
    limits = container(pod.group)["resources"]["limits"]
    options = {
        "num-cpus": str(int(quantity(limits["cpu"]))),
        "memory": str(int(quantity(limits["memory"]))),
        # Of all pods on this machine only one can have the port that each would have.
        "metrics-export-port": "8080" if pod.ip == HEAD else "0",
        "dashboard-agent-listen-port": str(AGENT_HERE),
        **pod.group["rayStartParams"],
        "node-ip-address": pod.ip,
    }
    return [f"--{name}={value}" for name, value in options.items()] + ["--block"]

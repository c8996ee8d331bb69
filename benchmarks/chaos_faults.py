"""What is done to a job, its nodes, its store and its disk, and when: all drawn from a seed."""

import random
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from chaos_nodes import Nodes
from chaos_store import Store

DISK_MIB = 512
DISK_FULL_S = 10.0
STORE_DOWN_S = 15.0
RETRY_S = 2.0
SETTLED_S = 30.0
"""A driver's memory is compared with what it was when it had run for so long."""

# Of a hundred faults; engines have processes of their own with `--engine cpu`.
WEIGHTS = {
    "worker": 40, "raylet": 20, "driver": 15, "head": 10, "store": 8, "disk": 7, "engine": 20,
}  # fmt: skip
PROCESSES = {
    "worker": "ShardWorker", "raylet": "raylet", "head": "gcs_server", "engine": "EngineCore",
}  # fmt: skip


@dataclass
class Run:
    """One driver: how it ended, and its memory by its age in seconds."""

    exit_code: int | None = None
    rss_mib: list[tuple[float, float]] = field(default_factory=list)

    @property
    def growth_mib(self) -> float:
        """What its memory grew by after it had settled."""
        settled = [mib for age, mib in self.rss_mib if age >= SETTLED_S]
        return max(settled) - settled[0] if settled else 0.0


@contextmanager
def small_disk(folder: Path) -> Iterator[Path | None]:
    """A file system of its own for what Ray writes, if this user may mount one."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield folder if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


class Campaign:
    """Runs the job again and again, and does the planned faults as it goes on.

    `count` faults are drawn, over the first 95% of so many parts.
    """

    def __init__(
        self,
        nodes: Nodes,
        store: Store,
        disk: Path | None,
        random_: random.Random,
        *,
        count: int,
        parts: int,
        engines: bool,
    ) -> None:
        missing = {"disk": disk is None, "engine": not engines}
        kinds = [kind for kind in WEIGHTS if not missing.get(kind)]
        # Each kind at least once.
        drawn = random_.choices(kinds, [WEIGHTS[kind] for kind in kinds], k=count)
        drawn[: len(kinds)] = kinds[: len(drawn)]
        random_.shuffle(drawn)
        places = sorted(random_.uniform(0, 0.95) * parts for _ in drawn)
        self.planned = list(zip(places, drawn, strict=True))
        """Faults that are still to be done, and after how many parts."""
        self.done: Counter[str] = Counter()
        self.runs: list[Run] = []
        self.nodes, self.store = nodes, store
        self._random, self._disk = random_, disk
        self._disk_full_until: float | None = None

    def run(
        self, command: Sequence[str], environment: Mapping[str, str], folder: Path, minutes: float
    ) -> None:
        """Return when the job has ended with 0; what it says goes to `driver.log`."""
        path = folder / "driver.log"
        deadline = time.monotonic() + 60 * minutes
        while not self.runs or self.runs[-1].exit_code != 0:
            with path.open("ab") as log:
                driver = psutil.Popen(command, env=environment, stdout=log, stderr=log)
                self.runs.append(Run())
                try:
                    self.runs[-1].exit_code = self._watch(driver, self.runs[-1], deadline)
                finally:
                    if driver.poll() is None:
                        driver.kill()
                        driver.wait()
                    self._free_disk(now=True)
            if self.runs[-1].exit_code in (None, 2, 3):
                raise SystemExit(f"it does not come to its end: {path.read_text()[-3000:]}")
            time.sleep(RETRY_S)

    def _watch(self, driver: psutil.Popen, run: Run, deadline: float) -> int | None:
        """Do what is planned until the driver ends, and look at its memory once a second.

        Gives its exit code; None where there is no time left.
        """
        began, sampled, due = time.monotonic(), 0.0, None
        while (code := driver.poll()) is None and (now := time.monotonic()) < deadline:
            if now - sampled >= 1.0:
                sampled = now
                run.rss_mib.append((now - began, driver.memory_info().rss / (1 << 20)))
            self._free_disk()
            if self.planned and len(self.store.parts) >= self.planned[0][0]:
                due = due or now + self._random.uniform(0, 3)
                if now >= due and self._do(self.planned[0][1], driver):
                    self.done[self.planned.pop(0)[1]] += 1
                    due = None
            time.sleep(0.1)
        return code

    def _do(self, kind: str, driver: psutil.Popen) -> bool:
        """Do a fault; False where there is nothing to do it to yet."""
        if kind == "driver":
            driver.kill()
            return True
        if kind == "store":
            self.store.fail_for(self._random.uniform(0, 2 * STORE_DOWN_S))
            return True
        if kind == "disk":
            assert self._disk is not None
            fill(self._disk)
            self._disk_full_until = time.monotonic() + DISK_FULL_S
            return True
        if kind == "head":
            return self.nodes.head.kill(PROCESSES[kind])
        nodes = self._random.sample(self.nodes.others, len(self.nodes.others))
        return any(node.kill(PROCESSES[kind]) for node in nodes)

    def _free_disk(self, *, now: bool = False) -> None:
        if self._disk_full_until is not None and (now or time.monotonic() > self._disk_full_until):
            assert self._disk is not None
            (self._disk / "ballast").unlink()
            self._disk_full_until = None


def fill(disk: Path) -> None:
    """Write until there is no room left."""
    with (disk / "ballast").open("wb", buffering=0) as stream:
        try:
            while True:
                stream.write(bytes(1 << 16))
        except OSError:
            return

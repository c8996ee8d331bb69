"""A run's progress as an object under its output, where any process can read it.

`_progress.json` is rewritten while rows are answered, and tells afterwards how that ended. No
answer depends on it: where it cannot be written, the run says so once and goes on.
"""

import threading
import time
from types import TracebackType

from rich.console import Console

from phi4ray.batch.plan import PROGRESS_NAME
from phi4ray.batch.progress import Window
from phi4ray.config import Config
from phi4ray.errors import ObjectNotFoundError, StorageError
from phi4ray.storage import join, storage_for

WRITE_S = 2.0
"""Between two writes: 1,800 small requests an hour."""


class RunProgress(Config):
    """How a run stood at `updated_at`, in Unix seconds by the clock of its driver."""

    plan_id: str
    updated_at: float
    window: Window


class ProgressFile:
    """Writes the newest snapshot inside a block, in a thread: a slow store delays no answer."""

    def __init__(self, output: str, plan_id: str, console: Console) -> None:
        self._uri = join(output, PROGRESS_NAME)
        self._plan_id = plan_id
        self._console = console
        self._newest: RunProgress | None = None
        self._written: RunProgress | None = None
        self._warned = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="phi4ray-progress", daemon=True)

    def __enter__(self) -> "ProgressFile":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()

    def update(self, window: Window) -> None:
        """Take the newest snapshot; it is written when its turn comes, and at the block's end."""
        self._newest = RunProgress(plan_id=self._plan_id, updated_at=time.time(), window=window)

    def _run(self) -> None:
        ended = False
        while not ended:
            ended = self._ended.wait(WRITE_S)
            self._write()

    def _write(self) -> None:
        newest = self._newest
        if newest is None or newest is self._written:
            return
        try:
            storage_for(self._uri).write(self._uri, newest.model_dump_json().encode())
            self._written = newest
        except StorageError as error:
            if not self._warned:
                self._console.print(
                    f"progress cannot be shown elsewhere, the job goes on: {error}", style="yellow"
                )
            self._warned = True


def read_progress(output: str) -> RunProgress | None:
    """What the run that writes to this output told last; None where there is none.

    Raises:
        StorageError: the store cannot be asked.
    """
    uri = join(output, PROGRESS_NAME)
    try:
        return RunProgress.model_validate_json(storage_for(uri).read(uri))
    except ObjectNotFoundError:
        return None
    except ValueError:  # another version of phi4ray runs there, and its log tells the same
        return None

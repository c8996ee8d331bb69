"""What of this machine a submitted job needs: a folder to run in, and the file of --config."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from phi4ray.errors import ConfigError


@contextmanager
def uploaded(
    working_dir: Path | None, config: str | None
) -> Iterator[tuple[Path | None, str | None]]:
    """The folder to upload, if any, and the name that the file of --config has in it.

    A checkout of phi4ray is uploaded, so that its code runs; elsewhere nothing is, but for the
    file, and the phi4ray that the cluster's nodes have runs.

    Raises:
        ConfigError: the file is not below the folder.
    """
    if working_dir is None and Path("jobs/batch_infer.py").is_file():
        working_dir = Path()
    if config is None:
        yield working_dir, None
    elif working_dir is not None:
        file, folder = Path(config).resolve(), working_dir.resolve()
        if not file.is_relative_to(folder):
            raise ConfigError(
                f"--config {config} is not below the folder that is uploaded, {folder}: move it "
                "there, or give another --working-dir"
            )
        yield working_dir, str(file.relative_to(folder))
    else:
        with tempfile.TemporaryDirectory(prefix="phi4ray-") as scratch:
            yield Path(scratch), Path(shutil.copy(config, scratch)).name

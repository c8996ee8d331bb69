"""The cause of a failed start, from what the engine's process logged.

vLLM's engine runs in a child process. When that cannot start, the parent learns only that it
failed ("See root cause above"); the cause is in the log. Where standard output and error are
files, as in Ray's workers, it can be read back from there.
"""

import os
import re
import stat
from collections.abc import Callable

_ERROR = re.compile(r"\b((?:[a-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Interrupt)): (.*\S)")
_CONSEQUENCES = ("Engine core initialization failed", "WorkerProc initialization failed")
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


def watch() -> Callable[[], str | None]:
    """Start watching this process's output; call the result for the cause logged since then."""
    starts = {fd: os.fstat(fd).st_size for fd in (1, 2) if stat.S_ISREG(os.fstat(fd).st_mode)}

    def cause() -> str | None:
        found = None
        for fd, start in starts.items():
            with open(f"/proc/self/fd/{fd}", "rb") as stream:
                stream.seek(start)
                found = cause_in(stream.read().decode(errors="replace")) or found
        return found

    return cause


def cause_in(text: str) -> str | None:
    """The last error of a log that is not the mere consequence of another one."""
    found = None
    for line in _ANSI.sub("", text).splitlines():
        match = _ERROR.search(line)
        if match and not match[2].startswith(_CONSEQUENCES):
            found = f"{match[1]}: {match[2]}"
    return found

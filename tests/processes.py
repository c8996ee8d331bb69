"""Processes that tests start, with all those below them."""

from contextlib import suppress

import psutil

from phi4ray.exporter import PORTS
from tests.waiting import until


def kill_family(process: psutil.Popen) -> None:
    """SIGKILL a process and all below it, at once; wait until they have ended."""
    family: list[psutil.Process] = [process]
    with suppress(psutil.NoSuchProcess):  # it has ended already
        family += process.children(recursive=True)
    for one in family:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait(30)
    until(lambda: not any(map(lives, family)), 30)


def lives(process: psutil.Process) -> bool:
    """Whether it has not ended; one that nobody has waited for has."""
    with suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def replicas_below(process: psutil.Process) -> list[psutil.Process]:
    """The replicas of an application on a cluster that the process has started."""
    found = []
    for one in process.children(recursive=True):
        with suppress(psutil.Error):  # it ends just now
            if "ServeReplica:phi4:replica" in " ".join(one.cmdline()):
                found.append(one)
    return found


def metrics_ports(process: psutil.Process) -> list[int]:
    """Where a process tells its metrics if it is a replica, by the exporter's ports."""
    with suppress(psutil.Error):  # it ends just now
        return [
            one.laddr.port
            for one in process.net_connections("tcp")
            if one.status == psutil.CONN_LISTEN and one.laddr.port in PORTS
        ]
    return []

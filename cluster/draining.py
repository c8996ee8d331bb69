"""How a replica gets to know that Serve is about to end it, and how it goes.

Serve calls nothing of a replica's class before its last request has been answered. What it tells at
once, to all who listen, is which replicas get requests: one that was among them and is not any more
is draining. It is told by the long poll that Serve's own handles listen to.
"""

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve._private.long_poll import LongPollNamespace, LongPollState
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus

RETRY_S = 1.0

logger = logging.getLogger(__name__)


async def follow_draining(replica: ReplicaID, drain: Callable[[bool], None]) -> None:
    """Tell `drain` whether this replica is draining, from now on and for as long as it lives."""
    served = False
    async for running in _running_replicas(replica.deployment_id):
        served = served or replica in running
        drain(served and replica not in running)


async def exit_with_the_application(replica: ReplicaID) -> None:
    """End this process when its application is deleted, however long it was to drain.

    For a replica whose draining is only for an application that goes on without it. Serve is not
    asked before it has told that none of the deployment's replicas gets requests any more.
    """
    served = False
    async for running in _running_replicas(replica.deployment_id):
        served = served or replica in running
        if served and not running:
            break
    while not await asyncio.to_thread(_deleted, replica.deployment_id.app_name):
        await asyncio.sleep(RETRY_S)
    os._exit(0)


async def _running_replicas(deployment: DeploymentID) -> AsyncIterator[set[ReplicaID]]:
    """Which replicas get requests, whenever that changes; without end."""
    key = (LongPollNamespace.DEPLOYMENT_TARGETS, deployment)
    seen = -1
    while True:
        try:
            controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
            updates = await controller.listen_for_change.remote({key: seen})
        except (RayError, ValueError):
            logger.warning("Serve's controller is away; whether this replica drains is not known")
            await asyncio.sleep(RETRY_S)
            continue
        if updates is LongPollState.TIME_OUT or key not in updates:
            continue
        seen = updates[key].snapshot_id
        yield {one.replica_id for one in updates[key].object_snapshot.running_replicas}


def _deleted(application: str) -> bool:
    try:
        found = serve.status().applications.get(application)
    except (RayError, RayServeException):
        return False  # Serve's controller is away, which says nothing of the application
    return found is None or found.status == ApplicationStatus.DELETING

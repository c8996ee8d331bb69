"""How a replica gets to know that Serve is about to end it.

Serve calls nothing of a replica's class before its last request has been answered. What it tells at
once, to all who listen, is which replicas get requests: one that was among them and is not any more
is draining. It is told by the long poll that Serve's own handles listen to.
"""

import asyncio
import logging
from collections.abc import Callable

import ray
from ray.serve._private.common import ReplicaID
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve._private.long_poll import LongPollNamespace, LongPollState

RETRY_S = 1.0

logger = logging.getLogger(__name__)


async def follow_draining(replica: ReplicaID, drain: Callable[[bool], None]) -> None:
    """Tell `drain` whether this replica is draining, from now on and for as long as it lives."""
    key = (LongPollNamespace.DEPLOYMENT_TARGETS, replica.deployment_id)
    seen, served = -1, False
    while True:
        try:
            controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
            updates = await controller.listen_for_change.remote({key: seen})
        except (ray.exceptions.RayError, ValueError):
            logger.warning("Serve's controller is away; whether this replica drains is not known")
            await asyncio.sleep(RETRY_S)
            continue
        if updates is LongPollState.TIME_OUT or key not in updates:
            continue
        seen = updates[key].snapshot_id
        targets = updates[key].object_snapshot.running_replicas
        here = any(target.replica_id == replica for target in targets)
        served = served or here
        drain(served and not here)

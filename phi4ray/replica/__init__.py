"""A replica: one vLLM engine behind vLLM's own OpenAI application. The only room that imports vLLM.

Works with vLLM 0.25.1 (old module names) and 0.32 (`vllm.entrypoints.launchers`), which bound the
extra `gpu`.
"""

from phi4ray.replica.arguments import server_args
from phi4ray.replica.vllm_replica import VllmReplica

__all__ = ["VllmReplica", "server_args"]

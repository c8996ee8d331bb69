"""Which of vLLM's paths mean what to us."""

from typing import Final

GENERATING: Final = frozenset(
    {
        "/v1/chat/completions",
        "/v1/chat/completions/batch",
        "/v1/completions",
        "/v1/responses",
        "/v1/messages",
        "/inference/v1/generate",
        "/invocations",
        "/cohere/v2/chat",
        "/generative_scoring",
        # Of models that embed or classify.
        "/v1/embeddings",
        "/v2/embed",
        "/pooling",
        "/classify",
        "/score",
        "/v1/score",
        "/rerank",
        "/v1/rerank",
        "/v2/rerank",
    }
)
"""Paths whose requests hold KV cache while they are answered."""

OPEN: Final = frozenset({"/health", "/ready", "/ping", "/version", "/metrics", "/load"})
"""Paths that machines ask every few seconds, without a key; logged only when they fail."""

FILES: Final = "/v1/files"
"""Where files are posted to: bodies of another size, which nobody holds in memory."""

BATCHES: Final = "/v1/batches"


def of_batches(path: str) -> bool:
    """Whether a path is the Batch API's."""
    return path in (FILES, BATCHES) or path.startswith((f"{FILES}/", f"{BATCHES}/"))

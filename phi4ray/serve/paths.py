"""Which of vLLM's paths mean what to us."""

from typing import Final

INVOCATIONS: Final = "/invocations"
"""SageMaker's: takes what one of the others takes."""

GENERATING: Final = frozenset(
    {
        "/v1/chat/completions",
        "/v1/chat/completions/batch",
        "/v1/completions",
        "/v1/responses",
        "/v1/messages",
        "/inference/v1/generate",
        INVOCATIONS,
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

CLIENTS: Final = frozenset(
    {
        *GENERATING,
        *OPEN,
        "/v1/models",
        "/tokenize",
        "/detokenize",
        "/tokenizer_info",
        "/v1/messages/count_tokens",
        "/v1/audio/transcriptions",
        "/v1/audio/translations",
        "/docs",
        "/redoc",
        "/openapi.json",
    }
)
"""What vLLM has for clients. The rest is for whoever runs it: to put it to sleep, to scale it, to
load adapters or weights, to abort requests of others."""


def of_clients(path: str) -> bool:
    """Whether a path is for those who have an API key of a tenant's."""
    path = path.rstrip("/") or "/"
    return (
        path in CLIENTS
        or of_batches(path)
        or path.startswith(("/v1/responses/", "/v1/models/"))
        or path.endswith(("/render", "/derender"))
    )


def of_batches(path: str) -> bool:
    """Whether a path is the Batch API's."""
    return path in (FILES, BATCHES) or path.startswith((f"{FILES}/", f"{BATCHES}/"))

"""Every scheme, by the real tools, to a checkpoint that a real vLLM engine loads and answers with.

The tools' environment is what `PHI4RAY_QUANTIZE_PYTHON` names; without it these tests are skipped.
"""

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phi4ray.engines import make_replica
from phi4ray.models import weight_scheme
from phi4ray.storage import join, storage_for
from phi4ray.train.environment import PYTHON
from phi4ray.train.quantize import quantize
from phi4ray.train.scheme import QuantizeConfig
from phi4ray.train.tiny import CORPUS, make_tiny_model
from tests.tiny_engines import tiny_engine

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON not in os.environ, reason=f"{PYTHON} names no Python that quantizes"),
]

SMALL: dict[str, Any] = {"num_samples": 16, "max_seq_length": 64, "iters": 4}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", num_hidden_layers=2)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [line for line in CORPUS.read_text("utf-8").splitlines() if line.strip()]
    texts = [{"text": line} for line in lines[::2]]
    chats = [{"prompt": line, "completion": "Yes."} for line in lines[1::2]]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in texts + chats))
    return str(path)


def logprobs(model: str) -> list[float]:
    """Of each token of a text, by a real engine with a checkpoint that it also answers with."""

    async def ask() -> list[float]:
        replica = make_replica(
            tiny_engine(model, max_model_len=512, max_num_seqs=8, max_num_batched_tokens=512)
        )
        await replica.start()
        try:
            text = CORPUS.read_text("utf-8")[:500]
            body = {"model": "phi-4", "prompt": text, "max_tokens": 8, "prompt_logprobs": 0}
            found = await replica.complete("/v1/completions", body)
        finally:
            await replica.stop()
        assert found.status == 200, found.body
        choice = found.body["choices"][0]
        assert choice["text"]
        tokens = choice["prompt_logprobs"][1:]
        return [entry["logprob"] for token in tokens for entry in token.values()]

    return asyncio.run(ask())


@pytest.fixture(scope="module")
def base(tiny: Path) -> list[float]:
    return logprobs(str(tiny))


@pytest.mark.engine
@pytest.mark.parametrize(
    ("scheme", "stored", "closeness"),
    [
        ("gptq-4bit", "w4a16", 0.6),
        ("fp8-dynamic", "fp8", 0.85),
        ("w8a8", "w8a8", 0.85),
        ("w4a16", "w4a16", 0.6),
    ],
)
def test_vllm_answers_with_a_schemes_checkpoint_much_as_with_the_base(
    scheme: str,
    stored: str,
    closeness: float,
    tiny: Path,
    base: list[float],
    rows: str,
    tmp_path: Path,
) -> None:
    output = tmp_path / scheme
    data = {"calibration": (rows,)} if scheme != "fp8-dynamic" else {}
    config = QuantizeConfig.model_validate(
        {"model": str(tiny), "output": str(output), "scheme": scheme, **data, **SMALL}
    )
    made = quantize(config)
    assert made.bytes_after < made.bytes_before
    assert weight_scheme(str(output)) == stored
    assert "## Made with" in (output / "README.md").read_text()
    # Garbled weights would make it 0.
    assert np.corrcoef(base, logprobs(str(output)))[0, 1] > closeness


def test_a_model_goes_from_bucket_to_bucket_with_scales_for_the_kv_cache(
    tiny: Path, rows: str, s3_prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from phi4ray.storage import copy_tree, upload_tree

    monkeypatch.setenv("PHI4RAY_MODEL_CACHE", str(tmp_path / "cache"))
    upload_tree(tiny, join(s3_prefix, "base"))
    data = join(s3_prefix, "rows.jsonl")
    storage_for(data).write(data, Path(rows).read_bytes())
    output = join(s3_prefix, "quantized")
    quantize(
        QuantizeConfig(
            model=join(s3_prefix, "base"),
            output=output,
            scheme="fp8-dynamic",
            kv_cache_scheme="fp8",
            calibration=(data,),
            num_samples=8,
            max_seq_length=64,
        )
    )
    folder = copy_tree(output, tmp_path / "copy")
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert settings["kv_cache_scheme"]["num_bits"] == 8
    assert settings["ignore"] == ["lm_head"]
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as weights:
        names = list(weights.keys())
    assert sum(name.endswith("k_scale") for name in names) == 2

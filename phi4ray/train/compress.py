"""One quantization, by AutoRound or llm-compressor, in an environment of theirs.

    python -P compress.py JOB.json

`phi4ray.train.quantize` writes the job and starts this file with the Python of an environment that
holds what vLLM's cannot: llm-compressor pins other versions of transformers and compressed-tensors.
So it imports nothing of phi4ray. The result is written beside the job as `outcome.json`.
"""

import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from typing import Any

PACKAGES = ("auto-round", "llmcompressor", "compressed-tensors", "transformers", "torch")
SHARD_SIZE = "5GB"

KV_CACHE_SCHEMES: Mapping[str, Mapping[str, Any]] = {
    "fp8": {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
}
"""Arguments of compressed-tensors' `QuantizationArgs`."""


def main() -> None:
    """Do the job and write down how it went."""
    path = Path(sys.argv[1])
    outcome: dict[str, Any] = {}
    try:
        outcome = compress(json.loads(path.read_text(encoding="utf-8")))
    except Exception as error:
        outcome = {"error": f"{type(error).__name__}: {error}"}
        raise
    finally:
        path.with_name("outcome.json").write_text(json.dumps(outcome), encoding="utf-8")


def compress(job: Mapping[str, Any]) -> dict[str, Any]:
    """Quantize `job["model"]` into the folder `job["output"]`; returns what a card should say."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job["model"], revision=job["revision"])
    model = AutoModelForCausalLM.from_pretrained(
        job["model"], revision=job["revision"], dtype="auto"
    )
    weights = {id(one): one.numel() * one.element_size() for one in model.parameters()}
    method = auto_round if job["scheme"] == "gptq-4bit" else llm_compressor
    samples, tokens = method(job, model, tokenizer, calibration_rows(job))
    return {
        "bytes_before": sum(weights.values()),
        "calibration_samples": samples,
        "calibration_tokens": tokens,
        "versions": {name: version(name) for name in PACKAGES},
    }


def auto_round(
    job: Mapping[str, Any], model: Any, tokenizer: Any, rows: Iterator[Any]
) -> tuple[int, int]:
    """Tune the rounding by signed gradient descent (https://arxiv.org/abs/2309.05516)."""
    import torch
    from auto_round import AutoRound

    width, limit = job["max_seq_length"], job["num_samples"]
    samples = list(islice(packed(encoded(tokenizer, rows, None), width), limit))
    if not samples:
        raise ValueError(
            f"the calibration data has less than one sample of {width} tokens: "
            "give more, or a lower max_seq_length"
        )
    output = Path(job["output"])
    _, saved = AutoRound(
        model,
        tokenizer,
        scheme={
            "bits": 4,
            "group_size": job["group_size"],
            "sym": True,
            "data_type": "int",
            "act_bits": 16,
        },
        dataset=[{"input_ids": torch.tensor([ids])} for ids in samples],
        nsamples=len(samples),
        seqlen=width,
        iters=job["iters"],
        batch_size=min(8, len(samples)),
        seed=job["seed"],
        device_map="auto" if torch.cuda.is_available() else "cpu",
    ).quantize_and_save(str(output / "auto-round"), format="auto_gptq")
    for path in Path(saved).iterdir():  # in a folder that it names itself
        path.rename(output / path.name)
    shutil.rmtree(output / "auto-round")
    return len(samples), sum(map(len, samples))


def llm_compressor(
    job: Mapping[str, Any], model: Any, tokenizer: Any, rows: Iterator[Any]
) -> tuple[int, int]:
    """Round by the scheme's method and save in compressed-tensors' format."""
    from datasets import Dataset
    from llmcompressor import oneshot

    samples: list[list[int]] = []
    arguments: dict[str, Any] = {"pipeline": "datafree"}
    if job["needs_calibration"]:
        samples = list(encoded(tokenizer, rows, job["max_seq_length"]))
        if not samples:
            raise ValueError("the calibration data has no row with text: give other files")
        arguments = {
            "dataset": Dataset.from_dict(
                {"input_ids": samples, "attention_mask": [[1] * len(ids) for ids in samples]}
            ),
            "num_calibration_samples": len(samples),
            "max_seq_length": job["max_seq_length"],
            "shuffle_calibration_samples": False,
            "pipeline": "sequential",
        }
    oneshot(model=model, tokenizer=tokenizer, recipe=recipe(job), **arguments)
    model.save_pretrained(job["output"], save_compressed=True, max_shard_size=SHARD_SIZE)
    tokenizer.save_pretrained(job["output"])
    return len(samples), sum(map(len, samples))


def recipe(job: Mapping[str, Any]) -> list[Any]:
    """llm-compressor's modifiers for a scheme; lm_head keeps its 16 bits in all of them."""
    from compressed_tensors.quantization import QuantizationArgs, preset_name_to_scheme
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    given: dict[str, Any] = {"ignore": ["lm_head"]}
    if job["kv_cache_scheme"]:
        given["kv_cache_scheme"] = QuantizationArgs(**KV_CACHE_SCHEMES[job["kv_cache_scheme"]])
    match job["scheme"]:
        case "fp8-dynamic":
            return [QuantizationModifier(targets="Linear", scheme="FP8_DYNAMIC", **given)]
        case "w8a8":
            smooth = SmoothQuantModifier(smoothing_strength=job["smoothing_strength"])
            gptq = GPTQModifier(targets="Linear", scheme="W8A8", **given)
            return [smooth, gptq] if job["smoothing_strength"] else [gptq]
        case "w4a16":
            scheme = preset_name_to_scheme("W4A16", ["Linear"])
            scheme.weights.group_size = job["group_size"]
            return [GPTQModifier(config_groups={"group_0": scheme}, **given)]
        case other:
            raise ValueError(f"unknown scheme {other!r}")


def calibration_rows(job: Mapping[str, Any]) -> Iterator[Any]:
    """Rows with `messages` or `text`: of the file that the job names, else of a hub dataset."""
    if not job["needs_calibration"]:
        return
    if job["calibration_file"]:
        with Path(job["calibration_file"]).open(encoding="utf-8") as stream:
            yield from map(json.loads, stream)
        return
    from datasets import load_dataset

    data = load_dataset(job["calibration_dataset"], split=job["calibration_split"])
    wanted = min(job["num_samples"], len(data))
    yield from data.shuffle(seed=job["seed"]).select(range(wanted))


def encoded(tokenizer: Any, rows: Iterator[Any], longest: int | None) -> Iterator[list[int]]:
    """Token ids of each row, chats as the chat template writes them; cut at `longest` tokens."""
    for row in rows:
        text = row.get("text")
        if row.get("messages"):
            text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        if text and (ids := tokenizer(text, add_special_tokens=not row.get("messages")).input_ids):
            yield ids[:longest]


def packed(samples: Iterator[list[int]], width: int) -> Iterator[list[int]]:
    """Samples put one after the other and cut anew: AutoRound drops what is not `width` long."""
    tokens = chain.from_iterable(samples)
    while len(piece := list(islice(tokens, width))) == width:
        yield piece


if __name__ == "__main__":
    main()

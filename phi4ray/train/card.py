"""The model card of a quantized checkpoint: how it was made and what was measured. Pure."""

import json
import re
from typing import Any

from phi4ray.models import find_model
from phi4ray.train.scheme import QuantizeConfig, Quantized, Record
from phi4ray.train.scores import Report
from phi4ray.train.tables import comparison_table, score_table, verdict_line

HOW = {
    "gptq-4bit": "Weights of 4 bits, symmetric, in groups of {group_size} inputs; rounded by "
    "AutoRound with {iters} iterations, in the GPTQ format.",
    "fp8-dynamic": "Weights in FP8 with a scale for each output; activations in FP8 with a scale "
    "for each token, taken while running. No calibration.",
    "w8a8": "Weights in INT8 with a scale for each output, by GPTQ after SmoothQuant at "
    "{smoothing_strength}; activations in INT8 with a scale for each token.",
    "w4a16": "Weights of 4 bits, symmetric, in groups of {group_size} inputs, by GPTQ.",
}


def record_of(config: QuantizeConfig, result: Quantized) -> Record:
    """The record of a quantization, without what is of one machine."""
    entry = find_model(config.model)
    public = {
        "model": entry.hub_id if entry else public_name(config.model),
        "calibration": tuple(map(public_name, config.calibration)),
        "output": public_name(config.output),
        "python": None,
    }
    return Record(
        config=config.model_copy(update=public),
        result=result.model_copy(update={"output": public["output"]}),
    )


def model_card(record: Record, report: Report | None) -> str:
    """The card as Markdown, headed by the metadata that the hub reads."""
    config, result = record.config, record.result
    entry, base = find_model(config.model), config.model
    head: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["phi4ray", "vllm", config.scheme],
    }
    if "/" in base:
        head |= {"base_model": base, "base_model_relation": "quantized"}
    if entry:
        head["license"] = entry.license.lower()
    parts = [
        "---\n"
        + "\n".join(f"{name}: {json.dumps(value)}" for name, value in head.items())
        + "\n---",
        f"# {base.rstrip('/').rpartition('/')[2]}, {config.scheme}",
        how(config),
        "## Made with",
        _list(
            {
                "base": base + (f" at {config.revision}" if config.revision else ""),
                "calibration": calibration(config, result),
                "weights": f"{result.bytes_before:,} bytes before, {result.bytes_after:,} after "
                f"({result.bytes_after / result.bytes_before:.0%})",
                "tools": ", ".join(f"{name} {text}" for name, text in result.versions.items()),
            }
        ),
        "Arguments:\n\n```json\n" + arguments(config) + "\n```",
        "## Measured",
    ]
    if report is None:
        return "\n\n".join([*parts, "Nothing yet."]) + "\n"
    parts.append(score_table(report))
    if report.against is not None:
        line = verdict_line(report)
        parts += [comparison_table(report), f"{line[:1].upper()}{line[1:]}."]
    return "\n\n".join([*parts, _list(dict(report.settings))]) + "\n"


def how(config: QuantizeConfig) -> str:
    """The scheme in words."""
    if config.scheme == "w8a8" and not config.smoothing_strength:
        text = HOW["w8a8"].replace(" after SmoothQuant at {smoothing_strength}", "")
    else:
        text = HOW[config.scheme]
    said = text.format(**config.model_dump()) + " `lm_head` and embeddings keep 16 bits."
    if config.kv_cache_scheme:
        said = said.replace(" No calibration.", "")
        said += " Scales for an FP8 KV cache are stored: vLLM uses them with `kv_cache_dtype=fp8`."
    return said


def calibration(config: QuantizeConfig, result: Quantized) -> str:
    """What the model was calibrated on."""
    if not config.needs_calibration:
        return "none"
    source = ", ".join(config.calibration) or f"{config.calibration_dataset} of the hub"
    return (
        f"{result.calibration_samples:,} samples, {result.calibration_tokens:,} tokens, of {source}"
    )


def arguments(config: QuantizeConfig) -> str:
    """The settings that decide the result, as JSON."""
    places = {"model", "output", "calibration", "python"}
    return config.model_dump_json(indent=2, exclude=places)


def public_name(place: str) -> str:
    """A hub name as it is, of any other place the last part: the rest is of its owner's machine."""
    if re.fullmatch(r"[\w.-]+/[\w.-]+", place) and not place.startswith("."):
        return place
    return place.rstrip("/").rpartition("/")[2]


def _list(items: dict[str, str]) -> str:
    return "\n".join(f"* {name}: {text}" for name, text in items.items())

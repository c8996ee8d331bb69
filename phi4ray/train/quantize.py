"""A quantization: a checkpoint in, a smaller one and its model card out.

    model, calibration rows → AutoRound or llm-compressor, in their environment → output

The work itself is `phi4ray.train.compress`. What a model loses is measured by
`phi4ray.train.evaluate`; `tell` puts its report into the card.
"""

import json
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from phi4ray.config import load_yaml, validated
from phi4ray.engines import on_this_machine
from phi4ray.errors import ConfigError, ObjectNotFoundError, QuantizationError
from phi4ray.models import shape_of, weight_scheme
from phi4ray.shapes import ModelShape
from phi4ray.storage import join, storage_for, upload_tree
from phi4ray.train import compress
from phi4ray.train.calibration import read_samples
from phi4ray.train.card import model_card, record_of
from phi4ray.train.environment import quantize_python
from phi4ray.train.evaluate import read_report
from phi4ray.train.scheme import GROUPED, QuantizeConfig, Quantized, Record

__all__ = ["QuantizeConfig", "Quantized", "quantize"]

CARD, RECORD = "README.md", "quantized.json"


def quantize(config: QuantizeConfig, console: Console | None = None) -> Quantized:
    """Quantize a model and write it with its card; `config.json` comes last.

    Raises:
        ConfigError: the settings do not fit the model, or the output holds a model already.
        InputError: the calibration rows cannot be read.
        QuantizationError: the tool failed or was killed.
        StorageError: the model cannot be read or the result not written.
    """
    console = console or Console(quiet=True)
    began = time.monotonic()
    check_output(config.output)
    model = on_this_machine(config.model)
    check_model(config, model)
    with tempfile.TemporaryDirectory(prefix="phi4ray-quantize-") as name:
        work, made = Path(name), Path(name) / "model"
        made.mkdir()
        samples = work / "calibration.jsonl"
        if config.calibration:
            rows = read_samples(config.calibration, config.num_samples, config.seed)
            samples.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        python = quantize_python(config.python)
        console.print(f"{config.scheme} of {config.model} with {python}")
        outcome = _compress(python, work, job_of(config, model, made, samples))
        result = Quantized(
            output=config.output,
            bytes_after=sum(path.stat().st_size for path in made.glob("*.safetensors")),
            seconds=time.monotonic() - began,
            **outcome,
        )
        record = record_of(config, result)
        (made / RECORD).write_text(record.model_dump_json(indent=2), encoding="utf-8")
        (made / CARD).write_text(model_card(record, None), encoding="utf-8")
        _publish(made, config.output)
    return result


def tell(output: str, report: str) -> None:
    """Put an evaluation's `report.json` into the card of a checkpoint that `quantize` wrote.

    Raises:
        ConfigError: the folder is no such checkpoint, or the report none.
        StorageError: one of them cannot be read, or the card not written.
    """
    uri = join(output, RECORD)
    try:
        text = storage_for(uri).read(uri).decode()
    except ObjectNotFoundError as error:
        raise ConfigError(f"{output} is no checkpoint that jobs/quantize.py wrote") from error
    card = model_card(validated(Record, load_yaml(text, uri)), read_report(report))
    storage_for(uri).write(join(output, CARD), card.encode())


def job_of(config: QuantizeConfig, model: str, made: Path, samples: Path) -> dict[str, Any]:
    """What `phi4ray.train.compress` is told."""
    job = config.model_dump(exclude={"calibration", "python", "output", "model"}, mode="json")
    return {
        **job,
        "model": model,
        "output": str(made),
        "needs_calibration": config.needs_calibration,
        "calibration_file": str(samples) if config.calibration else None,
    }


def check_output(output: str) -> None:
    """Refuse to write into a checkpoint.

    Raises:
        ConfigError: there is one.
    """
    uri = join(output, "config.json")
    try:
        storage_for(uri).head(uri)
    except ObjectNotFoundError:
        return
    raise ConfigError(f"{output} holds a model already: choose another --output or remove it")


def check_model(config: QuantizeConfig, model: str) -> None:
    """Refuse what cannot be quantized so, before anything is loaded.

    Raises:
        ConfigError: the model is quantized already, or a layer's inputs do not divide into groups.
    """
    found = weight_scheme(model)
    if found != "bf16":
        raise ConfigError(f"{config.model} is quantized already ({found}): start from its base")
    shape = shape_of(model)
    if config.scheme in GROUPED and shape is not None:
        for layer, inputs in layer_inputs(shape).items():
            if inputs % config.group_size:
                raise ConfigError(
                    f"layer {layer} has {inputs} inputs, which --group-size {config.group_size} "
                    f"does not divide: try {largest_group(shape)}"
                )


def layer_inputs(shape: ModelShape) -> dict[str, int]:
    """How many inputs each kind of linear layer has: what groups divide."""
    return {
        "self_attn.qkv_proj": shape.hidden_size,
        "self_attn.o_proj": shape.num_attention_heads * shape.head_dim,
        "mlp.gate_up_proj": shape.hidden_size,
        "mlp.down_proj": shape.intermediate_size,
    }


def largest_group(shape: ModelShape) -> int:
    """The largest usual group size that divides the inputs of all layers; 1 if none does."""
    inputs = layer_inputs(shape).values()
    return next((size for size in (128, 64, 32, 16) if not any(n % size for n in inputs)), 1)


def _compress(python: Path, work: Path, job: Mapping[str, Any]) -> dict[str, Any]:
    """Run the quantizer in its environment; what it says goes to this process's output."""
    path, outcome = work / "job.json", work / "outcome.json"
    path.write_text(json.dumps(job), encoding="utf-8")
    # -P: that folder's names, such as `evaluate`, are packages' names too.
    done = subprocess.run([python, "-P", compress.__file__, path])
    said: dict[str, Any] = {}
    if outcome.exists():
        said = json.loads(outcome.read_text(encoding="utf-8"))
    if done.returncode or "error" in said:
        cause = said.get("error") or f"it ended with {done.returncode}, as when memory is short"
        raise QuantizationError(f"{job['scheme']} failed: {cause}")
    return said


def _publish(made: Path, output: str) -> None:
    """Write the checkpoint out. `config.json` comes after all else: without it nothing loads."""
    config = made / "config.json"
    text = config.read_bytes()
    config.unlink()
    upload_tree(made, output)
    uri = join(output, config.name)
    storage_for(uri).write(uri, text)

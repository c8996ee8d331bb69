"""The command `phi4ray`: what it can do, one function a command, each printing a plan object.

Exit codes: 0 it is done or fits, 1 it fails or cannot fit, 2 bad arguments.
"""

import dataclasses
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from phi4ray.config import validated
from phi4ray.errors import ConfigError, Phi4rayError
from phi4ray.footprint import kv_bytes_per_token, tensor_parallel_sizes
from phi4ray.gpus import GIB, GPUS
from phi4ray.models import CATALOGUE, CatalogueEntry
from phi4ray.serve.tenants import new_key
from phi4ray.sizing import Sizing, SizingRequest, size

app = typer.Typer(
    name="phi4ray",
    help="Phi-4 over huge prompt datasets, and as a service, on one fleet of GPUs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]


def main() -> None:
    """Run the command line."""
    app()


@app.callback()
def _commands() -> None:
    # Keeps typer from making the only command the program itself.
    pass


@app.command()
def models(as_json: AsJson = False) -> None:
    """List the Phi-4 family: shapes, needs, sampling and quantized checkpoints."""
    if as_json:
        _print_json([model_facts(entry) for entry in CATALOGUE])
        return
    table = Table(show_lines=True)
    for title in ("model", "needs", "sampling", "quantized checkpoints"):
        table.add_column(title, overflow="fold")
    for entry in CATALOGUE:
        facts = model_facts(entry)
        head = (
            f"{entry.hub_id}\n{entry.parameters / 1e9:.2f}B, {entry.license}\n"
            f"{entry.shape.max_model_len:,} tokens\n"
            f"{facts['kv_bytes_per_token']:,} KV bytes a token"
        )
        needs = [f"--{n.replace('_', '-')} {v}" for n, v in facts["needs"].items()]
        sampling = [f"{name}={value}" for name, value in entry.recommended_sampling.items()]
        quantized = [f"{hub_id} ({scheme})" for hub_id, scheme in entry.quantized.items()]
        table.add_row(head, *("\n".join(lines) for lines in (needs, sampling, quantized)))
    new_console().print(table)


@app.command()
def plan(
    model: Annotated[str, typer.Option(help="name of the catalogue, local or s3:// folder")],
    gpu: Annotated[str, typer.Option(help=f"one of {', '.join(GPUS)}")],
    quantization: Annotated[
        str | None, typer.Option(help="fp8, w8a8, w4a16, or vLLM's name of a method")
    ] = None,
    kv_cache_dtype: Annotated[str, typer.Option(help="auto (16 bits) or fp8")] = "auto",
    context: Annotated[
        int | None, typer.Option(min=1, help="max_model_len in tokens; default: the model's")
    ] = None,
    gpu_memory_utilization: Annotated[float, typer.Option(help="share of the GPU, to 1")] = 0.9,
    tensor_parallel_size: Annotated[
        int | None, typer.Option(min=1, help="GPUs a replica; default: the fewest that fit")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="of a typical request")] = 512,
    completion_tokens: Annotated[int, typer.Option(min=1, help="of a typical request")] = 256,
    rows: Annotated[int | None, typer.Option(min=1, help="of a batch job")] = None,
    tokens_per_s: Annotated[
        float | None, typer.Option(help="prompt and answer tokens that replicas must reach")
    ] = None,
    gpu_hour_price: Annotated[float | None, typer.Option(help="in any currency")] = None,
    as_json: AsJson = False,
) -> None:
    """Plan memory, settings, speed and cost of a model on a GPU, before renting any."""
    with exit_codes():
        given = {
            "model": model,
            "gpu": gpu,
            "quantization": quantization,
            "kv_cache_dtype": kv_cache_dtype,
            "max_model_len": context,
            "gpu_memory_utilization": gpu_memory_utilization,
            "tensor_parallel_size": tensor_parallel_size,
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "rows": rows,
            "tokens_per_s": tokens_per_s,
            "gpu_hour_price": gpu_hour_price,
        }
        sizing = size(validated(SizingRequest, given))
    if as_json:
        _print_json(dataclasses.asdict(sizing))
    elif sizing.problem is None:
        new_console().print(_table(f"{sizing.model} on {sizing.gpu}", sizing_lines(sizing)))
    if sizing.problem is not None:
        typer.echo(f"error: {sizing.problem}", err=True)
        raise typer.Exit(1)


@app.command()
def key(name: Annotated[str, typer.Argument(help="whose key it is")]) -> None:
    """Make an API key; prints it once, and what goes into the keys file."""
    secret, digest = new_key()
    new_console().print(f"key, for {name} only: {secret}")
    new_console().print("for gate.keys_file, below `tenants:`")
    new_console().print(
        f'- {{name: {json.dumps(name, ensure_ascii=False)}, key_sha256: ["{digest}"]}}'
    )


def model_facts(entry: CatalogueEntry) -> dict[str, Any]:
    """What is known of a model, for JSON; `needs` are arguments of `vllm serve`."""
    needs = {
        "reasoning_parser": entry.reasoning_parser,
        "tool_call_parser": entry.tool_call_parser,
        "chat_template": entry.tool_chat_template,
    }
    return {
        "model": entry.hub_id,
        "description": entry.description,
        "license": entry.license,
        "parameters": entry.parameters,
        "shape": dataclasses.asdict(entry.shape),
        "kv_bytes_per_token": kv_bytes_per_token(entry.shape),
        "tensor_parallel_sizes": tensor_parallel_sizes(entry.shape),
        "chat_format": entry.chat_format,
        "needs": {name: value for name, value in needs.items() if value is not None},
        "recommended_sampling": dict(entry.recommended_sampling),
        "quantized": dict(entry.quantized),
    }


def sizing_lines(sizing: Sizing) -> list[tuple[str, str]]:
    """Name and value of a plan's figures; memory is of one GPU, speed of one replica."""
    memory, speed, job = sizing.memory, sizing.throughput, sizing.job
    lines = [
        ("usable memory", f"{memory.usable_bytes / GIB:.2f} of {memory.total_bytes / GIB:.2f} GiB"),
        (f"weights ({sizing.weights})", f"{memory.weight_bytes / GIB:.2f} GiB"),
        ("activations", f"{memory.activation_bytes / GIB:.2f} GiB"),
        (
            "runtime and CUDA graphs",
            f"{(memory.non_torch_bytes + memory.cuda_graph_bytes) / GIB:.2f} GiB",
        ),
        (f"KV cache ({sizing.kv_cache_dtype})", f"{memory.kv_cache_bytes / GIB:.2f} GiB"),
        ("KV bytes a token", f"{memory.kv_bytes_per_token:,}"),
        ("KV blocks", f"{memory.num_gpu_blocks:,}"),
        ("KV cache, tokens", f"{memory.kv_cache_size_tokens:,}"),
        (f"requests of {memory.max_model_len:,} tokens at once", f"{memory.max_concurrency:.2f}"),
        ("max_num_seqs", f"{sizing.max_num_seqs:,}"),
        ("max_num_batched_tokens", f"{sizing.max_num_batched_tokens:,}"),
        ("tensor_parallel_size", f"{sizing.tensor_parallel_size}"),
    ]
    if speed is not None:
        lines += [
            ("requests at once", f"{speed.concurrency:,}"),
            ("prefill", f"about {speed.prefill_tokens_per_s:,.0f} tok/s"),
            ("decode", f"about {speed.decode_tokens_per_s:,.0f} tok/s"),
            ("decode of one request", f"about {speed.decode_one_tokens_per_s:,.0f} tok/s"),
            ("a long job, prompts and answers", f"about {speed.total_tokens_per_s:,.0f} tok/s"),
            ("of these, answers", f"about {speed.completion_tokens_per_s:,.0f} tok/s"),
            ("replicas", f"{sizing.replicas:,}"),
        ]
    if job is not None:
        lines += [
            (f"{job.rows:,} rows", f"about {job.hours:,.2f} hours, {job.gpu_hours:,.2f} of GPUs"),
            ("all replicas", f"about {job.tokens_per_s:,.0f} tok/s"),
        ]
        if job.cost is not None:
            lines.append(("cost", f"about {job.cost:,.2f}"))
    return lines


@contextmanager
def exit_codes() -> Iterator[None]:
    """Say on stderr what went wrong, and exit with the code for it."""
    try:
        yield
    except Phi4rayError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2 if isinstance(error, ConfigError) else 1) from error


def new_console() -> Console:
    """A console that prints names whole."""
    # Off a terminal there is no width to keep to: names stay whole for whoever greps them.
    width = None if sys.stdout.isatty() else 160
    return Console(width=width, highlight=False, markup=False, emoji=False)


def _table(title: str, lines: list[tuple[str, str]]) -> Table:
    table = Table(title=title, show_header=False)
    for name, value in lines:
        table.add_row(name, value)
    return table


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))


if __name__ == "__main__":
    main()

"""The whole circle on this machine's CPU: train, quantize, evaluate, batch, serve, with figures.

make circle

A tiny Phi-4 learns to add numbers of up to three digits, from random weights, by jobs/finetune.py.
Its answers can be checked, so what the other jobs do to it is seen: in 10 to 20 minutes and without
a GPU, from S3 to S3 by an embedded server. No problem that it is tested on was trained on.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # when run as a script

from jobs.demo import ROOT, WORK, embedded_s3
from jobs.flags import told
from phi4ray.errors import EngineStartError, IncompleteOutputError, Phi4rayError
from phi4ray.storage import copy_tree, join, storage_for, upload_tree
from phi4ray.train.curve import HISTORY_NAME, decode_history
from phi4ray.train.evaluate import REPORT_JSON, read_report
from phi4ray.train.scheme import GROUPED
from phi4ray.train.sums import Sum, held_out_sums, training_sums
from phi4ray.train.tiny import make_tiny_model

CHATS, TUNED, QUANTIZED = "s3://demo/chats/", "s3://demo/tuned/", "s3://demo/quantized/"
PROBLEMS, ANSWERS = "s3://demo/problems/", "s3://demo/answers/"
EVALUATION = "s3://demo/evaluation/"

TASK = "nq_open"
"""lm-eval's task of short questions, whose words `phi4ray.train.sums` uses: exact match."""

NAME = "microsoft/phi-4"
PORT = 8000
START_S = 300.0

Row = tuple[str, str, float]
"""A line of the last table: what was done, what came of it, and the seconds it took."""


def main(argv: Sequence[str] | None = None) -> int:
    """Go round; returns 0, or the exit code of the job that failed."""
    arguments = parser().parse_args(argv)
    console = Console(highlight=False)
    rows: list[Row] = []
    problems = held_out_sums(arguments.problems)
    try:
        with embedded_s3():
            write_chats(arguments.chats)
            if arguments.trained is None:
                rows.append(train(console, arguments.steps))
                tuned = copy_tree(join(TUNED, "model"), WORK / "trained-phi-4")
                console.print(f"the model stays in {tuned}; --trained takes it")
            else:
                tuned = arguments.trained
                upload_tree(tuned, join(TUNED, "model"))
            rows.append(quantize(console, arguments.scheme, arguments.group_size))
            rows += evaluate(console, problems[: arguments.evaluated])
            rows.append(batch(console, problems))
            rows.append(serve(console, tuned, problems[:5], arguments.port))
    except subprocess.CalledProcessError as error:
        ended = f"{' '.join(map(str, error.cmd[1:3]))} … ended with {error.returncode}"
        print(f"error: {ended}", file=sys.stderr)
        return error.returncode
    except Phi4rayError as error:
        return told(error)
    table = Table("step", "result", "seconds", title="the circle", title_justify="left")
    for name, result, seconds in rows:
        table.add_row(name, result, f"{seconds:.0f}")
    console.print(table)
    return 0


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    result = argparse.ArgumentParser(
        "circle.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add("--steps", type=int, default=2200, help="optimizer steps [%(default)s]")
    add("--chats", type=int, default=200_000, help="sums to learn from [%(default)s]")
    add("--trained", type=Path, metavar="FOLDER", help="no training: the model of another circle")
    add("--problems", type=int, default=3000, help="held-out sums for the batch [%(default)s]")
    add("--evaluated", type=int, default=1000, help="of them for the evaluation [%(default)s]")
    add("--scheme", default="w8a8", help="how the model is quantized [%(default)s]")
    add("--group-size", type=int, default=64, help="of a 4-bit scheme [%(default)s]")
    add("--port", type=int, default=PORT, help="of the service [%(default)s]")
    return result


def write_chats(count: int) -> None:
    """Put so many sums where the jobs look for chats."""
    rows = ({"prompt": s.question, "completion": s.answer} for s in training_sums(count))
    write_lines(join(CHATS, "sums.jsonl"), rows)


def train(console: Console, steps: int) -> Row:
    """A blank model of Phi-4's architecture learns sums."""
    blank = make_tiny_model(
        WORK / "blank-phi-4", hidden_size=128, num_hidden_layers=2, initializer_range=0.02
    )
    seconds = run(
        console, "jobs/finetune.py", "--input", CHATS, "--output", TUNED, "--model", str(blank),
        "--method", "full", "--dtype", "float32", "--no-gradient-checkpointing",
        "--max-steps", str(steps), "--per-device-batch-size", "128",
        "--gradient-accumulation-steps", "1", "--learning-rate", "2e-3",
        "--warmup-fraction", "0.05", "--adam-beta2", "0.98",
        "--checkpoint-every-steps", "500", "--logging-steps", "20",
        "--gpus-per-worker", "0", "--cpus-per-worker", str(os.cpu_count()),
    )  # fmt: skip
    points = decode_history(storage_for(TUNED).read(join(TUNED, HISTORY_NAME)))
    loss = f"loss {points[0].loss:.3f} → {points[-1].loss:.4f}"
    return f"fine-tune, {steps:,} steps", f"{loss}, {points[-1].tokens:,} tokens", seconds


def quantize(console: Console, scheme: str, group_size: int) -> Row:
    """The trained model gets smaller; calibrated on chats that it was trained on."""
    groups = ("--group-size", str(group_size)) if scheme in GROUPED else ()
    seconds = run(
        console, "jobs/quantize.py", "--model", join(TUNED, "model"), "--output", QUANTIZED,
        "--scheme", scheme, *groups, "--calibration", CHATS,
        "--num-samples", "256", "--max-seq-length", "64",
    )  # fmt: skip
    sizes = (size_of(join(TUNED, "model")), size_of(QUANTIZED))
    return f"quantize, {scheme}", "{:.2f} → {:.2f} MB of weights".format(*sizes), seconds


def evaluate(console: Console, problems: Sequence[Sum]) -> list[Row]:
    """Both models answer the same held-out problems."""
    data = WORK / "problems.jsonl"
    lines = [json.dumps({"question": f"{s.a}+{s.b}", "answer": s.answer}) for s in problems]
    data.write_text("\n".join(lines))
    seconds = run(
        console, "jobs/evaluate.py", "--recipe", "tiny-cpu", "--model", join(TUNED, "model"),
        "--against", QUANTIZED, "--tasks", TASK, "--data", f"{TASK}={data}",
        "--num-fewshot", "0", "--apply-chat-template", "--output", EVALUATION,
        accepted=(0, 3, 4),
    )  # fmt: skip
    report = read_report(join(EVALUATION, REPORT_JSON))
    rows = []
    for name, measured in (("as trained", report.base), ("quantized", report.against)):
        if measured is not None:
            share = next(one.value for one in measured.scores if one.metric == "exact_match")
            result = f"{share or 0:.2%} exact match of {len(problems):,}"
            rows.append((f"evaluate, {name}", result, measured.seconds))
    for one in report.comparisons:
        text = f"{one.difference:+.2f} points ({one.low:+.2f} to {one.high:+.2f}): {one.verdict}"
        rows.append(("the difference", text, seconds))
    return rows


def batch(console: Console, problems: Sequence[Sum]) -> Row:
    """The trained model answers them all as a batch job, S3 to S3."""
    rows = ({"id": f"{s.a}+{s.b}", "prompt": s.question, "answer": s.answer} for s in problems)
    write_lines(join(PROBLEMS, "sums.jsonl"), rows)
    seconds = run(
        console, "jobs/batch_infer.py", "--recipe", "tiny-cpu", "--model", join(TUNED, "model"),
        "--input", PROBLEMS, "--output", ANSWERS, "--set", "max_tokens=8",
    )  # fmt: skip
    storage = storage_for(ANSWERS)
    parts = [item.uri for item in storage.list(ANSWERS) if item.uri.endswith(".parquet")]
    table = pa.concat_tables(pq.read_table(io.BytesIO(storage.read(uri))) for uri in parts)
    answered = {row["id"]: row for row in table.to_pylist()}
    if len(answered) != len(problems):
        raise IncompleteOutputError(f"{len(answered)} answers to {len(problems)} problems")
    right = sum((row["text"] or "").strip() == row["answer"] for row in answered.values())
    result = f"{right / len(problems):.2%} exact match of {len(problems):,}"
    return f"batch job, {len(parts)} parts", result, seconds


def serve(console: Console, model: Path, problems: Sequence[Sum], port: int) -> Row:
    """The trained model answers over HTTP."""
    began = time.monotonic()
    right = 0
    with service(console, model, port) as client:
        for problem in problems:
            chat = [{"role": "user", "content": problem.question}]
            body = {"model": NAME, "messages": chat, "max_tokens": 8, "temperature": 0}
            answer = client.post("/v1/chat/completions", json=body).raise_for_status().json()
            text = answer["choices"][0]["message"]["content"].strip()
            console.print(f"{problem.a} + {problem.b} = {text}")
            right += text == problem.answer
    return "serve over HTTP", f"{right} of {len(problems)} right", time.monotonic() - began


@contextmanager
def service(console: Console, model: Path, port: int) -> Iterator[httpx.Client]:
    """Run jobs/serve.py inside the block; gives a client of it.

    Raises:
        EngineStartError: it ended, or did not answer in time.
    """
    command = [
        sys.executable, "jobs/serve.py", "--recipe", "tiny-cpu", "--model", str(model),
        "--served-model-name", NAME, "--port", str(port),
    ]  # fmt: skip
    console.rule(" ".join(["python", *command[1:4], "…"]))
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            deadline = time.monotonic() + START_S
            while not answers(client):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise EngineStartError("jobs/serve.py does not answer: see what it printed")
                time.sleep(1)
            yield client
    finally:
        process.terminate()
        process.wait()


def answers(client: httpx.Client) -> bool:
    """Whether the service is there."""
    try:
        return client.get("/v1/models").status_code == 200
    except httpx.TransportError:
        return False


def run(console: Console, *command: str, accepted: Sequence[int] = (0,)) -> float:
    """Run one of the jobs as anyone would; gives the seconds it took.

    Raises:
        CalledProcessError: its exit code is not among the accepted ones.
    """
    console.rule(" ".join(["python", *command[:5], "…"]))
    began = time.monotonic()
    code = subprocess.run([sys.executable, *command], cwd=ROOT).returncode
    if code not in accepted:
        raise subprocess.CalledProcessError(code, ["python", *command])
    return time.monotonic() - began


def write_lines(uri: str, rows: Iterator[dict[str, str]]) -> None:
    """Write rows as JSONL."""
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    storage_for(uri).write(uri, text.encode())


def size_of(uri: str) -> float:
    """Megabytes of weights below a prefix."""
    found = storage_for(uri).list(uri)
    return sum(item.size for item in found if item.uri.endswith(".safetensors")) / 1e6


if __name__ == "__main__":
    sys.exit(main())

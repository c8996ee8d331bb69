"""The command line: plans that are right, and exit codes that scripts can trust."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from phi4ray.cli import app
from phi4ray.models import CATALOGUE
from phi4ray.serve.tenants import digest, parse

H200 = ("--model", "microsoft/phi-4", "--gpu", "h200", "--quantization", "fp8",
        "--kv-cache-dtype", "fp8", "--context", "16384")  # fmt: skip


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def planned(*arguments: str) -> dict[str, Any]:
    result = run("plan", *arguments, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


# models


def test_all_models_are_listed_with_what_they_need() -> None:
    listed = run("models")
    assert listed.exit_code == 0
    for entry in CATALOGUE:
        assert entry.hub_id in listed.stdout
        for hub_id in entry.quantized:
            assert hub_id[:40] in listed.stdout
    assert "--reasoning-parser deepseek_r1" in listed.stdout


def test_models_are_listed_as_json() -> None:
    found = {model["model"]: model for model in json.loads(run("models", "--json").stdout)}
    phi4 = found["microsoft/phi-4"]
    assert phi4["shape"]["hidden_size"] == 5120
    assert phi4["tensor_parallel_sizes"] == [1, 2]
    assert found["microsoft/Phi-4-mini-instruct"]["needs"] == {
        "tool_call_parser": "phi4_mini_json",
        "chat_template": "tool_chat_template_phi4_mini.jinja",
    }


# plan


def test_the_measured_kv_cache_of_an_h200_is_planned() -> None:
    plan = planned(*H200)
    assert plan["memory"]["kv_cache_size_tokens"] == pytest.approx(1_139_056, rel=0.01)
    assert plan["memory"]["weight_bytes"] / 2**30 == pytest.approx(14.74, rel=0.01)
    assert plan["memory"]["kv_bytes_per_token"] == 102_400
    assert (plan["max_num_seqs"], plan["max_num_batched_tokens"]) == (1024, 16384)
    assert (plan["tensor_parallel_size"], plan["replicas"], plan["job"]) == (1, 1, None)


def test_the_same_figures_are_printed_for_people() -> None:
    text = run("plan", *H200, "--rows", "1000", "--gpu-hour-price", "4").stdout
    for told in ("14.74 GiB", "102,400", "69.5", "1,024", "16,384", "1,000 rows", "cost"):
        assert told in text


def test_replicas_reach_the_tokens_a_second_that_are_asked_for() -> None:
    one = planned(*H200)["throughput"]["total_tokens_per_s"]
    assert planned(*H200, "--tokens-per-s", str(3.5 * one))["replicas"] == 4


def test_a_job_costs_its_gpu_hours_and_the_start_of_every_engine() -> None:
    flags = (*H200, "--rows", "100000", "--gpu-hour-price", "3")
    one = planned(*flags)["job"]
    four = planned(*flags, "--tokens-per-s", "100000")["job"]
    assert one["cost"] == pytest.approx(3 * one["gpu_hours"])
    assert one["gpu_hours"] == one["hours"]
    assert four["gpu_hours"] == pytest.approx(4 * four["hours"])
    assert one["hours"] / 4 < four["hours"] < one["hours"]


def test_the_fewest_gpus_that_fit_are_taken() -> None:
    flags = ("--model", "phi-4", "--context", "8192")
    assert planned(*flags, "--gpu", "l40s")["tensor_parallel_size"] == 1
    assert planned(*flags, "--gpu", "l4")["tensor_parallel_size"] == 2


def test_settings_shrink_with_the_card() -> None:
    small = planned(
        "--model", "RedHatAI/phi-4-quantized.w4a16", "--gpu", "rtx-12", "--context", "2048"
    )
    assert small["weights"] == "w4a16"
    assert small["max_num_batched_tokens"] == 2048
    assert 1 <= small["max_num_seqs"] <= 8


def test_a_folder_is_planned_by_its_own_config(tmp_path: Path) -> None:
    config = {
        "model_type": "phi3", "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    plan = planned("--model", str(tmp_path), "--gpu", "l4")
    assert plan["memory"]["kv_bytes_per_token"] == 2 * 3 * 2 * 64 * 2
    assert plan["memory"]["max_model_len"] == 4096


def test_what_cannot_fit_exits_1_and_says_what_would() -> None:
    flags = ("plan", "--model", "phi-4", "--gpu", "rtx-24", "--tensor-parallel-size", "1")
    refused = run(*flags)
    assert refused.exit_code == 1
    for would in ("fp8 weights", "w4a16", "tensor_parallel_size=2", "a GPU of the size of"):
        assert would in refused.stderr
    as_json = run(*flags, "--json")
    assert as_json.exit_code == 1
    assert json.loads(as_json.stdout)["problem"] in refused.stderr


def test_a_context_that_would_fit_is_named() -> None:
    flags = ("--model", "Phi-4-mini-instruct", "--gpu", "rtx-16", "--tensor-parallel-size", "1")
    refused = run("plan", *flags)
    assert refused.exit_code == 1
    advised = refused.stderr.partition("Any one of these would do: ")[2].split("; ")
    context = next(a for a in advised if a.startswith("max_model_len=")).partition("=")[2]
    assert planned(*flags, "--context", context)["problem"] is None


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--model", "llama", "--gpu", "h200"), "the shape of 'llama' is not known"),
        (("--model", "phi-4", "--gpu", "b9000"), "GPU 'b9000' is not known"),
        (("--model", "phi-4", "--gpu", "h200", "--quantization", "q5"), "quantization 'q5'"),
        (("--model", "phi-4", "--gpu", "h200", "--context", "32768"), "more than the model's"),
        (("--model", "phi-4", "--gpu", "h200", "--context", "256"), "more than the context of 256"),
        (("--model", "phi-4", "--gpu", "h200", "--tensor-parallel-size", "5"), "does not divide"),
        (("--model", "phi-4", "--gpu", "h200", "--gpu-memory-utilization", "2"), "less than or"),
        (
            ("--model", "stelterlab/phi-4-AWQ", "--gpu", "h200", "--quantization", "fp8"),
            "holds w4a16 weights already",
        ),
        (("--model", "phi-4"), "--gpu"),
        (("--model", "phi-4", "--gpu", "h200", "--rows", "0"), "--rows"),
    ],
)
def test_bad_arguments_exit_2_and_are_named(arguments: tuple[str, ...], told: str) -> None:
    refused = run("plan", *arguments)
    assert refused.exit_code == 2
    assert told in " ".join(refused.stderr.split())


# keys


@pytest.mark.parametrize("name", ["acme", 'Team "A"', "C:\\team", "équipe 🙂"])
def test_a_key_is_shown_once_and_its_digest_fits_the_keys_file(name: str) -> None:
    shown = run("key", name).stdout.splitlines()
    secret = shown[0].rpartition(" ")[2]
    keys = parse("tenants:\n" + shown[-1], "keys.yaml")
    assert keys.tenants[0].name == name
    assert keys.tenants[0].key_sha256 == (digest(secret),)

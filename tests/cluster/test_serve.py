"""The service as clients see it: `jobs/serve.py` with a real engine, asked by real clients."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error

from phi4ray.train.tiny import make_tiny_model
from tests.small_jobs import answers, job, prompts, write_lines
from tests.soak import at_length
from tests.waiting import free_port, until_ready

ROOT = Path(__file__).parents[2]
MODEL = "phi-4"
PAGE = "https://chat.example.com"
pytestmark = [pytest.mark.cluster, pytest.mark.engine, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@dataclass(frozen=True)
class Service:
    """Where the tiny model is served, and the process that all of the service is below."""

    url: str
    process: psutil.Popen


@pytest.fixture(scope="module")
def service(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The tiny model, served."""
    folder, port = tmp_path_factory.mktemp("serve"), free_port()
    command = [
        sys.executable, "jobs/serve.py", "--recipe", "tiny-cpu", "--model", str(model),
        "--served-model-name", MODEL, "--port", str(port), "--max-model-len", "1024",
        "--engine-arg", "max_num_seqs=16", "tool_call_parser=hermes",
        "enable_auto_tool_choice=true", f'allowed_origins=["{PAGE}"]',
    ]  # fmt: skip
    url = f"http://127.0.0.1:{port}"

    with (folder / "log").open("wb") as log:
        environment = os.environ | {
            "RAY_AUTH_MODE": "disabled",  # no token is left on this machine
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
            "RAY_SERVE_INGRESS_ROUTER_REPLICAS_PER_NODE": "1",  # nothing is deployed anew
        }
        server = psutil.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        try:
            until_ready(url, server, folder / "log", 300)
            yield Service(url, server)
        finally:
            server.send_signal(signal.SIGINT)
            assert server.wait(120) == 0, (folder / "log").read_text(errors="replace")[-5000:]


@pytest.fixture(scope="module")
def base_url(service: Service) -> str:
    return service.url


@pytest.fixture(scope="module")
def client(base_url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0, timeout=60)


HELLO: list[Any] = [{"role": "user", "content": "Hello"}]


def test_a_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=8)
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 8


def test_a_streamed_chat_says_what_the_whole_one_says_and_its_usage(
    client: openai.OpenAI,
) -> None:
    asked: dict[str, Any] = {
        "model": MODEL, "messages": HELLO, "max_tokens": 12, "temperature": 0.0,
    }  # fmt: skip
    whole = client.chat.completions.create(**asked)
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_a_completion_with_echo_and_logprobs(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt="Once upon", max_tokens=3, echo=True, logprobs=2
    )
    assert answer.choices[0].text.startswith("Once upon")
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.token_logprobs is not None


def test_a_completion_of_token_ids(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=[5, 6, 7], max_tokens=3)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 3


def test_structured_output_follows_its_schema(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"answer": {"type": "string", "enum": ["yes", "no"]}},
        "required": ["answer"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        max_tokens=64,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "a", "schema": schema, "strict": True},
        },
    )
    assert json.loads(answer.choices[0].message.content or "")["answer"] in ("yes", "no")


def test_a_named_tool_is_called(client: openai.OpenAI) -> None:
    parameters = {
        "type": "object",
        "properties": {"unit": {"type": "string", "enum": ["celsius", "kelvin"]}},
        "required": ["unit"],
        "additionalProperties": False,
    }
    weather: Any = {"name": "weather", "parameters": parameters, "strict": True}
    answer = client.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        max_tokens=64,
        tools=[{"type": "function", "function": weather}],
        tool_choice={"type": "function", "function": {"name": "weather"}},
    )
    (call,) = answer.choices[0].message.tool_calls or ()
    assert call.type == "function"
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["unit"] in ("celsius", "kelvin")


def test_models_and_tokens(client: openai.OpenAI, base_url: str) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    tokens = httpx.post(f"{base_url}/tokenize", json={"model": MODEL, "prompt": "Hello"}).json()
    text = httpx.post(
        f"{base_url}/detokenize", json={"model": MODEL, "tokens": tokens["tokens"]}
    ).json()
    assert (tokens["count"], text["prompt"]) == (len(tokens["tokens"]), "Hello")


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"model": "gpt-5"}, 404),
        ({"messages": [{"role": "user", "content": "word " * 3000}]}, 400),
        ({"temperature": "hot"}, 400),
        ({"messages": []}, 400),
    ],
)
def test_a_bad_request_is_the_clients_error(
    client: openai.OpenAI, change: dict[str, Any], status: int
) -> None:
    with pytest.raises(openai.APIStatusError) as refused:
        client.chat.completions.create(**{"model": MODEL, "messages": HELLO, **change})
    assert refused.value.status_code == status
    assert refused.value.body


def metrics(base_url: str) -> dict[str, float]:
    lines = httpx.get(f"{base_url}/metrics/").text.splitlines()
    pairs = (line.rpartition(" ") for line in lines if not line.startswith("#"))
    return {name: float(value) for name, _, value in pairs}


def test_a_client_that_hangs_up_frees_its_tokens_at_once(base_url: str) -> None:
    url = httpx.URL(base_url)
    body = {"model": MODEL, "prompt": "go on", "max_tokens": 1000, "ignore_eos": True}
    raw = json.dumps(body | {"stream": True}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(raw)}\r\n\r\n"
    )
    with socket.create_connection((str(url.host), int(url.port or 0))) as connection:
        connection.sendall(head.encode() + raw)
        assert connection.recv(64).startswith(b"HTTP/1.1 200")
        assert metrics(base_url)["phi4ray:admitted_requests"] == 1
    deadline = time.monotonic() + 2  # a thousand tokens would take longer
    while metrics(base_url)["phi4ray:admitted_requests"]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    while metrics(base_url)['vllm:num_requests_running{engine="0",model_name="phi-4"}']:
        assert time.monotonic() < deadline + 2
        time.sleep(0.02)


def test_vllms_metrics_and_ours_are_on_one_page(base_url: str, client: openai.OpenAI) -> None:
    client.completions.create(model=MODEL, prompt="count me", max_tokens=2)
    found = metrics(base_url)
    assert found['vllm:generation_tokens_total{engine="0",model_name="phi-4"}'] > 0
    assert found["phi4ray:kv_capacity_tokens"] > 0
    assert any(name.startswith("phi4ray:requests_total{") for name in found)


def test_online_requests_are_answered_at_once_while_a_batch_job_fills_the_engine(
    service: Service, tmp_path: Path
) -> None:
    rows = 240
    write_lines(tmp_path / "in" / "a.jsonl", prompts(rows))
    before = metrics(service.url)
    command = [
        sys.executable, "jobs/batch_infer.py", "--serve", "phi4", "--input", f"{tmp_path}/in/",
        "--output", f"{tmp_path}/out", "--shard-rows", "50",
        "--set", "max_tokens=32", "temperature=0", "ignore_eos=true",
    ]  # fmt: skip
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": ray_address(service)}
    batch = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    while metrics(service.url)["phi4ray:batch_rows"] < 16 and batch.poll() is None:
        time.sleep(0.1)
    body = {"model": MODEL, "prompt": "hi", "max_tokens": 16, "ignore_eos": True}
    with httpx.Client(base_url=service.url, timeout=60) as client:
        # As many as the engine has places: all are batch rows', and all are given up.
        responses: list[httpx.Response] = []
        threads = [
            threading.Thread(
                target=lambda: responses.append(client.post("/v1/completions", json=body))
            )
            for _ in range(16)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [answer.status_code for answer in responses] == [200] * 16
    found = metrics(service.url)
    assert found["phi4ray:batch_aborted_rows"] > 0
    preempted = 'vllm:num_preemptions_total{engine="0",model_name="phi-4"}'
    assert found[preempted] == before[preempted]
    assert batch.wait(300) == 0, batch.communicate()[0]
    answered = answers(job(tmp_path))
    assert sorted(row["n"] for row in answered) == list(range(rows))
    assert {row["completion_tokens"] for row in answered} == {32}
    assert {row["error_code"] for row in answered} == {None}


def ray_address(service: Service) -> str:
    """What RAY_ADDRESS is of the cluster that a service has started."""
    commands = (process.cmdline() for process in service.process.children(recursive=True))
    [address] = {
        argument.removeprefix("--gcs-address=")
        for command in commands
        for argument in command
        if command[0].endswith("/raylet") and argument.startswith("--gcs-address=")
    }
    return address


def test_the_histograms_that_latency_is_asked_of_have_counted(
    base_url: str, client: openai.OpenAI
) -> None:
    told = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    queries = re.findall(r"^```promql\n(.*?)^```$", told, re.DOTALL | re.MULTILINE)
    names = set(re.findall(r"[a-z0-9]+:[a-z0-9_]+(?=_bucket\[)", "\n".join(queries)))
    assert len(names) == 6
    client.completions.create(model=MODEL, prompt="count me", max_tokens=3)
    found = metrics(base_url)
    for name in names:
        (count,) = [v for sample, v in found.items() if re.match(rf"{name}_count(\{{|$)", sample)]
        assert count > 0, name


def test_a_page_of_a_site_that_is_named_may_ask(base_url: str) -> None:
    ask = {
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    path = f"{base_url}/v1/chat/completions"
    told = httpx.options(path, headers=ask | {"origin": PAGE})
    assert told.status_code == 200
    assert told.headers["access-control-allow-origin"] == PAGE
    assert "authorization" in told.headers["access-control-allow-headers"].lower()
    assert httpx.options(path, headers=ask | {"origin": "https://other.com"}).status_code == 400


def test_the_readmes_examples_work(base_url: str) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    ours = {"http://localhost:8000": base_url, "microsoft/phi-4": MODEL}
    for language, program in (("python", [sys.executable, "-c"]), ("sh", ["sh", "-c"])):
        blocks = re.findall(rf"^```{language}\n(.*?)^```$", readme, re.DOTALL | re.MULTILINE)
        # tests/unit/test_batches.py runs the one of the Batch API.
        (script,) = [b for b in blocks if "localhost:8000" in b and "client.batches" not in b]
        for theirs, mine in ours.items():
            script = script.replace(theirs, mine)
        done = subprocess.run([*program, script], capture_output=True, text=True, check=True)
        assert done.stdout.strip()
        if language == "sh":
            assert json.loads(done.stdout)["object"] == "chat.completion"


def test_vllms_own_benchmark_gets_every_answer(base_url: str, model: Path, tmp_path: Path) -> None:
    asked = {
        "backend": "openai-chat", "endpoint": "/v1/chat/completions", "base_url": base_url,
        "model": MODEL, "tokenizer": str(model), "dataset_name": "random", "num_prompts": 32,
        "random_input_len": 64, "random_output_len": 16, "ignore_eos": True, "temperature": 0,
        "save_result": True, "result_filename": str(tmp_path / "result.json"),
    }  # fmt: skip
    command = [sys.executable, "benchmarks/serve_overhead.py", "--bench", json.dumps(asked)]
    subprocess.run(command, cwd=ROOT, check=True)
    found = json.loads((tmp_path / "result.json").read_text())
    assert (found["completed"], found["failed"]) == (32, 0)
    assert found["total_output_tokens"] == 32 * 16
    assert found["median_ttft_ms"] > 0


EXAMPLES = at_length(8, 25)
ASKED_MOST = ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize")


@pytest.mark.parametrize("path", ASKED_MOST)
def test_no_input_makes_a_server_error(path: str, base_url: str) -> None:
    """Requests that schemathesis makes up from the application's own OpenAPI description."""
    described = schemathesis.openapi.from_url(f"{base_url}/openapi.json")

    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
    @given(described[path]["POST"].as_strategy())
    def ask(case: schemathesis.Case) -> None:
        case.call_and_validate(base_url=base_url, checks=[not_a_server_error], timeout=60)

    ask()

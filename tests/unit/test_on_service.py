"""A job's configuration on a service's engine: what holds there is kept, all else is refused."""

from pathlib import Path

import pytest

from jobs.batch_infer import configuration, on_service, parser
from phi4ray.config import BatchConfig, EngineConfig
from phi4ray.errors import ConfigError

SERVED = EngineConfig(
    model="microsoft/phi-4",
    served_model_name="phi",
    max_model_len=4096,
    engine_args={"block_size": 16, "max_loras": 2},
)


def configured(folder: Path, text: str, *arguments: str) -> BatchConfig:
    path = folder / "job.yaml"
    path.write_text(text)
    job = ("--serve", "phi4", "--input", "in/", "--output", "out/", "--config", str(path))
    return configuration(parser().parse_args([*job, *arguments]))


def engine(folder: Path, text: str) -> EngineConfig:
    return on_service(configured(folder, text).engine, SERVED, "phi4")


def test_a_job_that_asks_for_nothing_runs_on_the_services_engine(tmp_path: Path) -> None:
    assert engine(tmp_path, "endpoint: /v1/completions\n") == SERVED
    assert configured(tmp_path, "endpoint: /v1/completions\n").endpoint == "/v1/completions"
    recipe = configured(tmp_path, "", "--recipe", "phi4-fp8-h200")
    assert on_service(recipe.engine, SERVED, "phi4") == SERVED


def test_settings_that_the_services_engine_has_hold(tmp_path: Path) -> None:
    text = (
        "engine: {model: microsoft/phi-4, served_model_name: phi, max_model_len: 4096, "
        "engine_args: {block_size: 16}}"
    )
    assert engine(tmp_path, text) == SERVED


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{model: microsoft/Phi-4-mini-instruct}", "engine.model is 'microsoft/phi-4' and not"),
        ("{served_model_name: other}", "engine.served_model_name is 'phi' and not 'other'"),
        ("{quantization: fp8}", "engine.quantization is None and not 'fp8'"),
        ("{engine_args: {block_size: 32}}", "engine.engine_args.block_size"),
        ("{env: {SECRET: hidden}}", r"engine.env.SECRET\n"),
    ],
)
def test_a_setting_that_is_another_one_there_is_refused(
    tmp_path: Path, text: str, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        engine(tmp_path, f"engine: {text}")


def test_a_misspelt_setting_is_refused_before_the_service_is_asked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"engine\.max_seqs"):
        configured(tmp_path, "engine: {max_seqs: 5}")


def test_how_many_replicas_there_are_is_the_services(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="leave out max_replicas"):
        configured(tmp_path, "", "--max-replicas", "2")
    with pytest.raises(ConfigError, match="leave out min_replicas"):
        configured(tmp_path, "min_replicas: 2")


def test_without_a_service_workers_are_sent_the_text_of_a_chat_template_s_file(
    tmp_path: Path,
) -> None:
    path = tmp_path / "t.jinja"
    path.write_text("{{ messages }}")
    given = ["--input", "a.jsonl", "--output", "o", "--model", "m"]
    given += ["--engine-arg", f"chat_template={path}"]
    assert configuration(parser().parse_args(given)).engine.chat_template == "{{ messages }}"

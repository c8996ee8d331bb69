"""Quantizing: what is refused before anything starts, what the tool is told, what the card says."""

import json
import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from jobs.quantize import FLAGS, configuration, main, parser
from phi4ray.config import validated
from phi4ray.errors import ConfigError, QuantizationError
from phi4ray.models import find_model
from phi4ray.storage import join, storage_for
from phi4ray.train.card import model_card, record_of
from phi4ray.train.environment import PYTHON, REQUIREMENTS, quantize_python
from phi4ray.train.quantize import (
    RECORD,
    check_model,
    job_of,
    largest_group,
    layer_inputs,
    quantize,
)
from phi4ray.train.scheme import QuantizeConfig, Quantized
from phi4ray.train.scores import Measured, Report, Score, compare_samples
from phi4ray.train.tiny import make_tiny_model

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]

RESULT = Quantized(
    output="out",
    bytes_before=29_320_000_000,
    bytes_after=9_180_000_000,
    calibration_samples=128,
    calibration_tokens=262_144,
    versions={"auto-round": "0.15.1"},
    seconds=60.0,
)


def config(**changed: object) -> QuantizeConfig:
    values = {"model": "microsoft/phi-4", "output": "out", "scheme": "w4a16"}
    return validated(QuantizeConfig, values, changed)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def test_the_defaults_are_those_of_the_published_4_bit_checkpoint() -> None:
    made = config(scheme="gptq-4bit")
    assert (made.group_size, made.num_samples, made.iters) == (128, 128, 256)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"scheme": "gptq-4bit", "kv_cache_scheme": "fp8"}, "use w4a16"),
        ({"scheme": "fp8-dynamic", "calibration": ["a.jsonl"]}, "needs none"),
        ({"scheme": "fp4"}, "scheme: "),
        ({"kv_cache_scheme": "int8"}, "kv_cache_scheme: "),
        ({"group_size": 0}, "group_size: "),
        ({"groups": 128}, "groups: Extra inputs"),
    ],
)
def test_settings_that_contradict_are_refused(changed: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        config(**changed)


def test_only_fp8_weights_with_scales_taken_while_running_need_no_data() -> None:
    assert not config(scheme="fp8-dynamic").needs_calibration
    assert config(scheme="fp8-dynamic", kv_cache_scheme="fp8").needs_calibration
    assert all(config(scheme=name).needs_calibration for name in ("gptq-4bit", "w8a8", "w4a16"))


def test_a_group_size_that_does_not_divide_names_the_layer_and_one_that_does(tiny: Path) -> None:
    with pytest.raises(ConfigError, match=r"qkv_proj has 256 inputs.* 100 .*try 128"):
        check_model(config(group_size=100), str(tiny))
    with pytest.raises(ConfigError, match=r"down_proj has 896 inputs.* 256 .*try 128"):
        check_model(config(group_size=256, scheme="gptq-4bit"), str(tiny))
    check_model(config(group_size=256, scheme="w8a8"), str(tiny))


def test_all_of_the_family_divides_into_groups_of_128() -> None:
    for name in ("phi-4", "Phi-4-mini-instruct"):
        entry = find_model(name)
        assert entry is not None
        assert largest_group(entry.shape) == 128
        assert len(set(layer_inputs(entry.shape))) == 4


def test_what_is_quantized_already_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"quantized already \(fp8\)"):
        check_model(config(), "RedHatAI/phi-4-FP8-dynamic")


def test_a_model_in_the_output_is_not_overwritten(prefix: str) -> None:
    uri = join(prefix, "config.json")
    storage_for(uri).write(uri, b"{}")
    with pytest.raises(ConfigError, match="holds a model already"):
        quantize(config(output=prefix))
    assert storage_for(uri).read(uri) == b"{}"


def test_the_tool_is_told_all_but_what_is_of_this_side() -> None:
    job = job_of(config(calibration=["s3://b/chats/"]), "/models/phi-4", Path("/w/m"), Path("/w/c"))
    assert json.loads(json.dumps(job)) == job
    assert (job["model"], job["output"], job["calibration_file"]) == (
        "/models/phi-4",
        "/w/m",
        "/w/c",
    )
    assert (job["scheme"], job["needs_calibration"], job["group_size"]) == ("w4a16", True, 128)
    assert job_of(config(), "m", Path("o"), Path("c"))["calibration_file"] is None


def test_a_tool_that_fails_leaves_no_output_and_says_why(tiny: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    wanted = config(
        model=str(tiny), output=str(output), scheme="fp8-dynamic", python=sys.executable
    )
    with pytest.raises(QuantizationError, match="No module named 'llmcompressor'"):
        quantize(wanted)
    assert not output.exists()


def test_the_environments_requirements_are_the_packages_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert list(REQUIREMENTS) == project["optional-dependencies"]["quantize"]


def test_a_python_may_be_named_by_flag_or_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PYTHON, "python3")
    assert quantize_python(sys.executable) == Path(sys.executable)
    assert quantize_python(None).name == "python3"
    with pytest.raises(ConfigError, match="no-such-python is no Python"):
        quantize_python("no-such-python")


def card(report: Report | None = None, **changed: object) -> tuple[dict[str, object], str]:
    """A card's metadata and its text."""
    record = record_of(config(**changed), RESULT)
    _, head, text = model_card(record, report).split("---\n", 2)
    return yaml.safe_load(head), text


def test_a_card_states_base_scheme_tools_arguments_data_and_sizes() -> None:
    head, text = card(model="phi-4", scheme="gptq-4bit", revision="abc")
    assert head["base_model"] == "microsoft/phi-4"
    assert head["license"] == "mit"
    assert "gptq-4bit" in str(head["tags"])
    for told in (
        "groups of 128 inputs",
        "256 iterations",
        "microsoft/phi-4 at abc",
        "128 samples, 262,144 tokens, of NeelNanda/pile-10k of the hub",
        "29,320,000,000 bytes before, 9,180,000,000 after (31%)",
        "auto-round 0.15.1",
        '"num_samples": 128',
        "Nothing yet.",
    ):
        assert told in text, told


@pytest.mark.parametrize("model", ["s3://bucket/tuned/", "/models/tuned", "models/2026/tuned"])
def test_a_card_names_no_place_that_its_readers_cannot_reach(model: str) -> None:
    head, text = card(model=model, calibration=["/home/me/chats.jsonl"])
    assert "base_model" not in head
    assert "license" not in head
    assert "# tuned, w4a16" in text
    for place in (model, "/home/me"):
        assert place not in text


def test_a_card_tells_of_kv_scales_and_of_what_was_left_out() -> None:
    assert "kv_cache_dtype=fp8" in card(scheme="fp8-dynamic", kv_cache_scheme="fp8")[1]
    assert "No calibration" in card(scheme="fp8-dynamic")[1]
    assert "SmoothQuant" in card(scheme="w8a8")[1].partition("## Made with")[0]
    assert "SmoothQuant" not in card(scheme="w8a8", smoothing_strength=0.0)[1]


def evaluation() -> Report:
    score = Score(
        task="gsm8k",
        version="3.0",
        filter="strict-match",
        n_shot="5",
        metric="exact_match",
        higher_is_better=True,
        value=0.93,
        stderr=0.0256,
    )
    one = Measured(model="phi-4", scores=(score,), samples={"gsm8k": 4000}, seconds=1.0)
    scores = {"gsm8k,exact_match,strict-match": {str(i): 1.0 for i in range(4000)}}
    return Report(
        base=one,
        against=one,
        comparisons=compare_samples(scores, scores, {}, bound_points=0.5, confidence=0.95),
        bound_points=0.5,
        confidence=0.95,
        settings={"lm-eval": "0.4.13"},
    )


def test_an_evaluations_table_and_verdict_come_into_the_card_later(prefix: str) -> None:
    record = record_of(config(model="/models/tuned"), RESULT)
    for name, text in (
        (RECORD, record.model_dump_json()),
        ("report.json", evaluation().model_dump_json()),
    ):
        storage_for(prefix).write(join(prefix, name), text.encode())
    assert main(["--output", prefix, "--measured", join(prefix, "report.json")]) == 0
    text = storage_for(prefix).read(join(prefix, "README.md")).decode()
    assert "# tuned, w4a16" in text
    assert "|0.9300|±  |0.0256| 0.9300|±  |0.0256|" in text
    assert "Pass: the loss is below 0.5 points on every task." in text
    assert "lm-eval: 0.4.13" in text


def test_a_record_names_no_place_of_its_makers_machine() -> None:
    made = config(model="/m/tuned", calibration=["/c/a.jsonl"], output="/o/small", python="/p/py")
    text = record_of(made, RESULT.model_copy(update={"output": "/o/small"})).model_dump_json()
    assert not re.findall(r'"/[^"]*"', text)


def test_a_report_for_another_folder_or_with_other_flags_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--output", str(tmp_path), "--measured", "report.json"]) == 2
    assert "no checkpoint that jobs/quantize.py wrote" in capsys.readouterr().err
    assert main(["--output", str(tmp_path), "--measured", "r.json", "--scheme", "w8a8"]) == 2
    assert "--measured goes with --output alone" in capsys.readouterr().err


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "q.yaml"
    path.write_text("{scheme: gptq-4bit, model: m, output: o, iters: 5, calibration: [a.jsonl]}")
    arguments = ["--config", str(path), "--iters", "7", "--calibration", "b.jsonl", "c.parquet"]
    made = configuration(parser().parse_args(arguments))
    assert (made.scheme, made.iters) == ("gptq-4bit", 7)
    assert made.calibration == ("b.jsonl", "c.parquet")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--scheme", "w8a8", "--group-size", "128"), "w8a8 takes no notice of group_size"),
        (("--scheme", "w4a16", "--smoothing-strength", "0.5"), "smoothing_strength"),
        (("--scheme", "w4a16", "--iters", "5"), "iters"),
        (("--scheme", "fp8-dynamic", "--num-samples", "8", "--seed", "1"), "num_samples, seed"),
    ],
)
def test_what_a_scheme_takes_no_notice_of_is_refused(
    arguments: tuple[str, ...], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        configuration(parser().parse_args(["--model", "m", "--output", "o", *arguments]))


def test_what_a_scheme_needs_is_taken_and_so_is_a_record_that_states_all_settings() -> None:
    for arguments in (
        ("--scheme", "gptq-4bit", "--group-size", "64", "--iters", "5"),
        ("--scheme", "w8a8", "--smoothing-strength", "0.5", "--num-samples", "8"),
        ("--scheme", "fp8-dynamic", "--kv-cache-scheme", "fp8", "--num-samples", "8"),
    ):
        made = configuration(parser().parse_args(["--model", "m", "--output", "o", *arguments]))
        assert validated(QuantizeConfig, made.model_dump()) == made


def test_an_interrupt_ends_in_a_line_and_with_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("jobs.quantize.quantize", interrupted)
    assert main(["--model", "m", "--output", "o", "--scheme", "w8a8"]) == 130
    assert capsys.readouterr().err == (
        "interrupted: no checkpoint was written, the same command begins anew\n"
    )


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_bad_arguments_end_with_2_and_name_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--scheme", "w4a16", "--num-samples", "0"]) == 2
    told = capsys.readouterr().err
    for field in ("model", "output", "num_samples"):
        assert f"  {field}: " in told


def test_help_tells_of_every_flag_and_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(["--help"])
    told = capsys.readouterr().out
    assert "exit codes: 0 the checkpoint is written" in told
    for name in (*FLAGS, "scheme", "calibration", "measured"):
        assert f"--{name.replace('_', '-')} " in told

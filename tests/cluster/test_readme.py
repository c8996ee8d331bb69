"""The README's examples, executed, and its tables held against the code."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from jobs import evaluate, finetune, quantize, serve
from jobs.batch_infer import JOB_FLAGS, configuration, main, parser
from jobs.flags import ENGINE_FLAGS
from phi4ray.batch.parts import COLUMNS
from phi4ray.batch.rows import Defaults, Request, to_request
from phi4ray.config import batch_config, load_yaml
from phi4ray.recipes import RECIPES
from phi4ray.serve.config import serve_config
from phi4ray.train.scheme import Scheme

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str = "") -> list[str]:
    """Code blocks of one language, without their indentation."""
    # All of them, or the end of one would be taken for the beginning of another.
    found = re.findall(r"^( *)```(\w*)\n(.*?)^\1```$", README, re.DOTALL | re.MULTILINE)
    return [
        re.sub(rf"^{indent}", "", body, flags=re.MULTILINE)
        for indent, name, body in found
        if name == language
    ]


def commands(job: str = "jobs/batch_infer.py") -> list[list[str]]:
    """The arguments of every call of a job in the README."""
    joined = "\n".join(blocks()).replace("\\\n", " ")
    lines = [line for line in joined.splitlines() if job in line]
    return [shlex.split(line.split(job, 1)[1]) for line in lines]


def test_its_commands_are_what_the_program_takes() -> None:
    assert len(commands()) == 3
    for arguments in commands():
        configuration(parser().parse_args(arguments))
    [tuning] = commands("jobs/finetune.py")
    finetune.configuration(finetune.parser().parse_args(tuning))


def test_its_quantizations_and_evaluations_are_what_those_programs_take() -> None:
    making, telling = (
        quantize.parser().parse_args(arguments) for arguments in commands("jobs/quantize.py")
    )
    assert quantize.configuration(making).scheme == "gptq-4bit"
    assert quantize.card_only(telling) == "s3://bucket/phi-4-gptq-4bit/"
    batch, online = (
        evaluate.configuration(evaluate.parser().parse_args(arguments))
        for arguments in commands("jobs/evaluate.py")
    )
    assert batch.against is not None
    assert batch.bound_points == 0.5
    assert online.base_url is not None


def test_its_schemes_are_all_there_are() -> None:
    table = README[README.index("| scheme | what it makes |") :].split("\n\n")[0]
    assert sorted(re.findall(r"^\| `([^`]+)`", table, re.MULTILINE)) == sorted(get_args(Scheme))


def test_its_flags_exist() -> None:
    known = {"--gpu-hour-price", "--config", "--address"}
    parsers = parser, serve.parser, finetune.parser, evaluate.parser, quantize.parser
    for described in (make() for make in parsers):
        known |= set(described.format_help().split())
    for flag in set(re.findall(r"`(--[a-z-]+)", README)):
        assert flag in known, flag


def test_its_rows_make_requests() -> None:
    rows = [json.loads(block) for block in blocks("json")]
    assert len(rows) == 2
    for row in rows:
        assert isinstance(to_request(row, Defaults("phi-4")), Request)


def test_its_recipes_are_all_there_are() -> None:
    table = README[README.index("| recipe | for |") :].split("\n\n")[0]
    assert re.findall(r"^\| `([^`]+)`", table, re.MULTILINE) == list(RECIPES)


def test_its_columns_are_those_of_the_parts() -> None:
    told = README[README.index("Columns: ") : README.index("carried ones. Any Parquet")]
    names = [name for quoted in re.findall(r"`([a-z_, \n]+)`", told) for name in quoted.split(",")]
    assert [name.strip() for name in names] == COLUMNS.names


def test_its_service_settings_are_valid() -> None:
    (text,) = [block for block in blocks("yaml") if "autoscaling" in block]
    config = serve_config(load_yaml(text, "README.md"))
    assert config.engine.quantization == "fp8"
    assert config.autoscaling.schedule[0].min_replicas == 3


def test_the_example_configuration_is_valid() -> None:
    path = ROOT / "examples" / "job.yaml"
    config = batch_config(load_yaml(path.read_text(), str(path)))
    assert config.engine.quantization == "fp8"


@pytest.mark.cluster
def test_the_local_example_runs_and_its_answers_are_read_as_it_says(tmp_path: Path) -> None:
    (local,) = [arguments for arguments in commands() if "fake" in arguments]
    for name in ("examples", "jobs", "cluster", "phi4ray"):
        (tmp_path / name).symlink_to(ROOT / name)
    command = [sys.executable, "jobs/batch_infer.py", *local]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode in (0, 3), done.stdout + done.stderr
    (script,) = [block for block in blocks("python") if "pyarrow" in block]
    read = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "capital-en" in read.stdout
    assert "fake:" in read.stdout


def test_help_tells_of_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parser().parse_args(["--help"])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert "exit codes: 0 all rows answered, 3 finished with error rows" in told
    for name in (*JOB_FLAGS, *ENGINE_FLAGS):
        assert f"--{name.replace('_', '-')} " in told


def test_bad_arguments_end_with_2_and_name_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--recipe", "fake", "--output", "out", "--set", "temperature"]) == 2
    assert "--set temperature: write KEY=VALUE" in capsys.readouterr().err
    assert main(["--recipe", "fake", "--limit", "0", "--engine-arg", "max_num_seqs=x"]) == 2
    told = capsys.readouterr().err
    for field in ("input", "output", "limit", "engine.max_num_seqs"):
        assert f"  {field}: " in told

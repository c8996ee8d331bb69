"""What a fine-tune shows: its progress, its curve, its report; and what its command line takes."""

import io
import math
import re
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from jobs import finetune
from phi4ray.errors import ConfigError, DivergedError
from phi4ray.train.config import FinetuneConfig
from phi4ray.train.curve import Point, decode_history, encode_history
from phi4ray.train.divergence import check_point
from phi4ray.train.plan import FinetunePlan
from phi4ray.train.progress import Progress, line_of
from phi4ray.train.report import render_report, smoothed

CONFIG = FinetuneConfig(input=("chats/",), output="out", model="microsoft/phi-4")
PLAN = FinetunePlan(
    plan_id="abc", identity={}, inputs=(), chats=900, refused=3, tokens=9000, answer_tokens=1000
)


def point(step: int, loss: float = 1.5, total: int = 100) -> Point:
    return Point(step, total, loss, 1e-4, 0.5, tokens=50 * step)


def shown(*points: tuple[float, Point]) -> list[str]:
    """What a log gets to see of points at seconds."""
    noon = datetime(2026, 1, 31, 12, 0, 0)
    console = Console(file=io.StringIO(), width=80, get_datetime=lambda: noon)
    with Progress(console) as progress:
        for now, one in points:
            progress.update(one, now)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


# progress


def test_a_line_says_how_far_it_is_how_fast_and_how_long_it_will_take() -> None:
    lines = shown((0, point(10)), (20, point(20)))
    assert lines[1] == (
        "12:00:00 step 20/100 (20%) loss 1.5000 | lr 1.00e-04 grad 0.50 | 25 tok/s 0.50 steps/s "
        "| ETA 0:02:40"
    )


def test_lines_come_every_ten_seconds_and_at_the_end() -> None:
    lines = shown(*((float(now), point(now + 1, total=35)) for now in range(35)))
    assert [re.findall(r"step (\d+)/", line) for line in lines] == [
        ["1"],
        ["11"],
        ["21"],
        ["31"],
        ["35"],
    ]


def test_a_replaced_worker_begins_at_its_checkpoint_and_has_no_negative_speed() -> None:
    lines = shown((0, point(50)), (10, point(60)), (70, point(41)), (80, point(51)))
    assert ["-" in line.split("|")[2] for line in lines] == [False] * 4
    assert "1.00 steps/s" in lines[-1]


def test_a_terminal_sees_a_bar() -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    with Progress(console) as progress:
        progress.update(point(50), 0.0)
    assert "step 50/100 (50%)" in console.file.getvalue()  # type: ignore[attr-defined]


def test_at_first_nobody_knows_how_long() -> None:
    assert line_of(point(1), 0.0, 0.0).endswith("ETA ?")


# curve and report


def test_a_curve_comes_back_as_it_was_written() -> None:
    points = [point(1), point(2, loss=0.25)]
    assert decode_history(encode_history(points)) == points


@given(st.lists(st.floats(0.01, 100), min_size=1))
def test_the_smoothed_loss_begins_with_the_loss_and_stays_within_it(losses: list[float]) -> None:
    made = list(smoothed(losses))
    assert made[0] == pytest.approx(losses[0])
    assert all(min(losses) * 0.999 <= value <= max(losses) * 1.001 for value in made)
    assert len(made) == len(losses)


def test_the_report_has_the_figures_the_curves_and_the_settings() -> None:
    html = render_report(CONFIG, PLAN, [point(step, loss=3 / step) for step in range(1, 101)])
    assert "Fine-tune of microsoft/phi-4: 900 chats" in html
    assert html.count("<svg") == 3
    assert html.count("<polyline") == 4
    assert ">step</text>" in html
    for text in ("refused rows", "3.0000", "0.0300", "gradient_accumulation_steps", "peft "):
        assert text in html


def test_an_infinite_norm_is_kept_and_left_out_of_its_chart() -> None:
    points = [point(1), replace(point(2), grad_norm=math.inf), point(3)]
    assert decode_history(encode_history(points)) == points
    html = render_report(CONFIG, PLAN, points)
    assert html.count("<polyline") == 4
    assert not re.search(r"\b(inf|nan)\b", html)


@pytest.mark.parametrize(
    "broken", [{"loss": math.nan}, {"loss": math.inf}, {"grad_norm": math.nan}]
)
def test_a_point_that_is_no_number_ends_the_training_and_says_what_helps(
    broken: dict[str, float],
) -> None:
    with pytest.raises(DivergedError, match=r"step 20 has .*(nan|inf).* a lower learning_rate"):
        check_point(replace(point(20), **broken))


def test_an_infinite_norm_that_is_cut_to_nothing_does_not() -> None:
    check_point(replace(point(20), grad_norm=math.inf))


def test_a_report_of_one_step_has_its_point() -> None:
    assert "<polyline" in render_report(CONFIG, PLAN, [point(1, total=1)])


# command line


def configured(*arguments: str) -> FinetuneConfig:
    return finetune.configuration(finetune.parser().parse_args(arguments))


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("{input: [a/], output: b, model: m, epochs: 3, lora: {rank: 8, alpha: 4}}")
    config = configured("--config", str(file), "--epochs", "2", "--alpha", "64")
    assert (config.epochs, config.lora.rank, config.lora.alpha) == (2, 8, 64)
    assert config.gradient_checkpointing
    assert not configured(
        "--config", str(file), "--no-gradient-checkpointing"
    ).gradient_checkpointing


def test_places_on_this_machine_are_named_in_full(tmp_path: Path) -> None:
    config = configured("--input", "a/", "--output", "b", "--model", "phi4ray")
    assert (config.output, config.model) == (
        str(Path("b").resolve()),
        str(Path("phi4ray").resolve()),
    )
    config = configured("--input", "a/", "--output", "s3://b/c/", "--model", "microsoft/phi-4")
    assert (config.output, config.model) == ("s3://b/c/", "microsoft/phi-4")


def test_fsdp_goes_through_to_transformers() -> None:
    config = configured(
        *("--input", "a/", "--output", "b", "--model", "m", "--num-workers", "8"),
        *("--training-arg", "fsdp=true", "fsdp_config={version: 2}"),
    )
    expected: dict[str, Any] = {"fsdp": True, "fsdp_config": {"version": 2}}
    assert config.training_args == expected


def test_fsdp_saves_whole_weights() -> None:
    with pytest.raises(ConfigError, match="state_dict_type is FULL_STATE_DICT"):
        configured(
            *("--input", "a/", "--output", "b", "--model", "m"),
            *("--training-arg", "fsdp_config={state_dict_type: SHARDED_STATE_DICT}"),
        )


@pytest.mark.parametrize("where", [("--num-workers", "1"), ("--gpus-per-worker", "0")])
def test_fsdp_without_gpus_to_split_a_model_over_is_refused(where: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="fsdp splits a model over GPUs"):
        configured(
            *("--input", "a/", "--output", "b", "--model", "m", "--num-workers", "2", *where),
            *("--training-arg", "fsdp=true"),
        )


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--output", "b", "--model", "m"), "input"),
        (("--input", "a", "--output", "b", "--model", "m", "--method", "qlora"), "method"),
        (("--input", "a", "--output", "b", "--model", "m", "--rank", "0"), r"lora\.rank"),
        (("--input", "a", "--output", "b", "--model", "m", "--training-arg", "seed=1"), "seed"),
    ],
)
def test_a_wrong_argument_is_named(arguments: tuple[str, ...], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        configured(*arguments)


def test_an_interrupt_ends_in_a_line_that_says_what_is_kept_and_with_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(**_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune, "connected", interrupted)
    assert finetune.main(["--input", "a/", "--output", "b", "--model", "m"]) == 130
    assert capsys.readouterr().err == (
        "interrupted: the same command goes on from the last whole checkpoint\n"
    )


def test_bad_arguments_end_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert finetune.main(["--output", "b"]) == 2
    assert "input: Field required" in capsys.readouterr().err

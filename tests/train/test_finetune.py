"""A fine-tune in this process: what it writes, what it refuses, and going on where it stopped."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from phi4ray.errors import (
    ConfigError,
    DivergedError,
    InputError,
    PlanMismatchError,
    TooManyErrorsError,
)
from phi4ray.train.config import FinetuneConfig
from phi4ray.train.curve import Point, decode_history
from phi4ray.train.finetune import FinetuneSummary, finetune
from phi4ray.train.host import InProcessHost
from tests.chat_models import SUMS, small_finetune
from tests.small_jobs import write_lines

pytestmark = pytest.mark.slow


def run(config: FinetuneConfig, console: Console | None = None) -> FinetuneSummary:
    return finetune(config, InProcessHost(), console or Console(file=io.StringIO()))


def curve(config: FinetuneConfig) -> list[Point]:
    return decode_history((Path(config.output) / "_history.json").read_bytes())


def weights(config: FinetuneConfig) -> dict[str, torch.Tensor]:
    return load_file(Path(config.output) / "model" / "model.safetensors")


class DyingHost(InProcessHost):
    """Goes away at a step, as a driver does that is interrupted."""

    def __init__(self, step: int) -> None:
        self._step = step

    def train(self, config: FinetuneConfig) -> Iterator[Point | None]:
        for point in super().train(config):
            yield point
            if point is not None and point.step >= self._step:
                raise KeyboardInterrupt


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> FinetuneConfig:
    """A LoRA fine-tune that ran in one go."""
    config = small_finetune(tmp_path_factory.mktemp("lora"))
    run(config)
    return config


def test_the_model_is_the_base_with_the_adapters_added(tuned: FinetuneConfig) -> None:
    base = load_file(Path(tuned.model) / "model.safetensors")
    made = weights(tuned)
    assert {name: (w.shape, w.dtype) for name, w in made.items()} == {
        name: (w.shape, w.dtype) for name, w in base.items()
    }
    adapter = load_file(Path(tuned.output) / "adapter" / "adapter_model.safetensors")
    changed = {name for name in base if not torch.equal(base[name], made[name])}
    layer = "model.layers.0"
    names = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    assert changed == {f"{layer}.{name}.weight" for name in names}
    for name in names:
        up, down = (adapter[f"base_model.model.{layer}.{name}.lora_{side}.weight"] for side in "BA")
        scale = tuned.lora.alpha / tuned.lora.rank
        whole = base[f"{layer}.{name}.weight"].float() + scale * (up @ down)
        torch.testing.assert_close(
            made[f"{layer}.{name}.weight"].float(), whole, rtol=2**-7, atol=2**-9
        )


def test_the_model_has_the_tokenizer_the_template_and_a_pad_token_of_its_own(
    tuned: FinetuneConfig,
) -> None:
    folder = Path(tuned.output) / "model"
    base, made = (AutoTokenizer.from_pretrained(path) for path in (tuned.model, folder))
    asked = [{"role": "user", "content": "2+2"}]
    options: dict[str, Any] = {"add_generation_prompt": True, "tokenize": False}
    assert made.apply_chat_template(asked, **options) == base.apply_chat_template(asked, **options)
    assert made.pad_token_id != made.eos_token_id == base.eos_token_id
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Phi3ForCausalLM"]
    assert config["use_cache"] is True
    assert tuned.output not in (folder / "config.json").read_text()
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.generation_config.eos_token_id == base.eos_token_id


def test_the_curve_has_every_step_a_linear_warm_up_and_a_falling_loss(
    tuned: FinetuneConfig,
) -> None:
    points = curve(tuned)
    assert [point.step for point in points] == list(range(1, 13))
    assert {point.steps_total for point in points} == {12}
    assert sum(point.loss for point in points[-4:]) < 0.8 * sum(p.loss for p in points[:4])
    rates = [point.learning_rate for point in points]
    assert rates[0] < tuned.learning_rate == max(rates)
    assert rates[1:] == sorted(rates[1:], reverse=True)
    report = (Path(tuned.output) / "_report.html").read_text()
    assert "<polyline" in report
    assert "Loss" in report


def test_a_run_that_was_interrupted_goes_on_to_the_same_weights(
    tuned: FinetuneConfig, tmp_path: Path
) -> None:
    config = small_finetune(tmp_path, lora={"dropout": 0.1})
    whole = config.model_copy(update={"output": f"{tmp_path}/whole"})
    run(whole)
    for step in (2, 6, 11):
        with pytest.raises(KeyboardInterrupt):
            finetune(config, DyingHost(step), Console(file=io.StringIO()))
        assert not (tmp_path / "out" / "_SUCCESS").exists()
    run(config)
    assert curve(config) == curve(whole)
    expected = weights(whole)
    for name, made in weights(config).items():
        assert torch.equal(made, expected[name]), name


def test_a_run_that_ended_before_its_model_was_written_does_not_train_again(
    tuned: FinetuneConfig, tmp_path: Path
) -> None:
    config = small_finetune(tmp_path)
    run(config)
    expected = weights(config)
    for name in ("_SUCCESS", "_history.json", "model/model.safetensors"):
        (tmp_path / "out" / name).unlink()
    console = Console(file=io.StringIO())
    run(config, console)
    assert "step " not in console.file.getvalue()  # type: ignore[attr-defined]
    assert all(torch.equal(made, expected[name]) for name, made in weights(config).items())


def test_a_finished_run_is_not_run_again(tuned: FinetuneConfig) -> None:
    before = {path: path.stat().st_mtime_ns for path in Path(tuned.output).rglob("*.safetensors")}
    summary = run(tuned)
    assert summary.model == f"{tuned.output}/model"
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_all_weights_learn_in_a_full_fine_tune(tmp_path: Path) -> None:
    config = small_finetune(tmp_path, method="full", max_steps=4, dtype="bfloat16")
    run(config)
    base = load_file(Path(config.model) / "model.safetensors")
    made = weights(config)
    assert {name: w.dtype for name, w in made.items()} == {n: w.dtype for n, w in base.items()}
    assert not [name for name in base if torch.equal(base[name], made[name])]
    assert not (Path(config.output) / "adapter").exists()


def test_other_settings_or_chats_on_one_output_are_refused(tuned: FinetuneConfig) -> None:
    changed = tuned.model_copy(update={"learning_rate": 0.5, "checkpoint_every_steps": 7})
    with pytest.raises(PlanMismatchError, match=r"learning_rate was 0\.01 and is now 0\.5"):
        run(changed)
    other = write_lines(Path(tuned.model).parent / "other.jsonl", SUMS[:4])
    with pytest.raises(PlanMismatchError, match=r"other\.jsonl is new"):
        run(tuned.model_copy(update={"input": (str(other),)}))


def test_rows_that_cannot_be_learned_from_stop_the_job_before_anything_is_written(
    tmp_path: Path,
) -> None:
    config = small_finetune(tmp_path)
    long = {"prompt": "a b c " * 200, "completion": "d"}
    write_lines(tmp_path / "chats.jsonl", [*SUMS, long, {"prompt": "1+1", "completion": ""}])
    with pytest.raises(TooManyErrorsError) as failed:
        run(config.model_copy(update={"max_length_tokens": 100}))
    assert f"{tmp_path}/chats.jsonl row 36, messages: has " in str(failed.value)
    assert f"{tmp_path}/chats.jsonl row 37, completion: the answer is empty" in str(failed.value)
    assert not (tmp_path / "out").exists()


def test_a_run_of_fewer_steps_than_lie_between_points_has_its_first(tmp_path: Path) -> None:
    summary = run(small_finetune(tmp_path, max_steps=2, logging_steps=20))
    assert [point.step for point in summary.points] == [1]


def test_a_share_of_them_may_be_left_out_and_is_reported(tmp_path: Path) -> None:
    config = small_finetune(tmp_path, max_steps=1, max_error_fraction=0.1)
    write_lines(tmp_path / "chats.jsonl", [*SUMS, {"prompt": "1+1", "completion": ""}])
    summary = run(config)
    assert (summary.plan.chats, summary.plan.refused) == (36, 1)
    [line] = (tmp_path / "out" / "_refused.jsonl").read_text().splitlines()
    refused = json.loads(line)
    assert refused["place"] == {"file": f"{tmp_path}/chats.jsonl", "row": 36}
    assert (refused["field"], refused["code"]) == ("completion", "empty_answer")


def test_nothing_to_learn_from_is_an_error(tmp_path: Path) -> None:
    config = small_finetune(tmp_path)
    (tmp_path / "chats.jsonl").write_text("\n")
    with pytest.raises(InputError, match="no chat to learn from"):
        run(config)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"lora": {"target_modules": ("q_proj",)}}, "target_modules"),
        ({"training_args": {"no_such": 1}}, "no_such"),
        ({"pad_token": "<|im_end|>"}, "the end token"),
    ],
)
def test_what_does_not_fit_the_model_is_said_once(
    tmp_path: Path, changes: dict[str, Any], why: str
) -> None:
    with pytest.raises(ConfigError, match=why):
        run(small_finetune(tmp_path, **changes))


@pytest.mark.parametrize("logging_steps", [1, 20])
def test_weights_that_are_no_numbers_are_neither_kept_nor_published(
    tmp_path: Path, logging_steps: int
) -> None:
    steps = {"max_steps": 3, "checkpoint_every_steps": 3, "logging_steps": logging_steps}
    config = small_finetune(tmp_path, learning_rate=1e38, **steps)
    for _ in range(2):  # the same command says the same again
        with pytest.raises(DivergedError, match=r"step [23].*a lower learning_rate"):
            run(config)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "_finetune.json",
        "_refused.jsonl",
        "_tokens.parquet",
    }


def test_a_checkpoint_with_such_weights_from_elsewhere_is_not_published(tmp_path: Path) -> None:
    config = small_finetune(tmp_path, max_steps=1)
    run(config)
    [kept] = (tmp_path / "out" / "_checkpoints").rglob("adapter_model.safetensors")
    weights = {name: torch.full_like(value, torch.nan) for name, value in load_file(kept).items()}
    save_file(weights, kept, {"format": "pt"})
    for name in ("_SUCCESS", "_history.json", "model/model.safetensors"):
        (tmp_path / "out" / name).unlink()
    with pytest.raises(DivergedError, match="weights after step 1 "):
        run(config)
    assert not (tmp_path / "out" / "model" / "model.safetensors").exists()


def test_training_args_cannot_take_what_a_field_says(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="training_args cannot set bf16, seed"):
        small_finetune(tmp_path, training_args={"seed": 1, "bf16": True})

"""A fine-tuned checkpoint in a real engine: the tokens that transformers has for it."""

import asyncio
import io
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from phi4ray.engines import make_replica
from phi4ray.train.finetune import finetune
from phi4ray.train.host import InProcessHost
from tests.chat_models import SUMS, small_finetune
from tests.tiny_engines import tiny_engine

pytestmark = pytest.mark.engine

ANSWER_TOKENS = 8


def prompts(model: str) -> list[list[int]]:
    """Some of what was learned, as tokens, by the checkpoint's own template."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    chats = [[{"role": "user", "content": row["prompt"]}] for row in SUMS[::9]]
    return [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        for chat in chats
    ]


def by_transformers(model: str, asked: list[list[int]]) -> list[list[int]]:
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    answers = []
    for prompt in asked:
        ids = torch.tensor([prompt])
        made = loaded.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=ANSWER_TOKENS, do_sample=False
        )
        answers.append(made[0, len(prompt) :].tolist())
    return answers


def by_vllm(model: str, asked: list[list[int]]) -> list[list[int]]:
    async def ask() -> list[list[int]]:
        replica = make_replica(tiny_engine(model, dtype="float32", max_model_len=512))
        await replica.start()
        try:
            answers = []
            for prompt in asked:
                body = {
                    "model": "phi-4", "prompt": prompt, "max_tokens": ANSWER_TOKENS,
                    "temperature": 0, "return_token_ids": True,
                }  # fmt: skip
                answer = await replica.complete("/v1/completions", body)
                assert answer.status == 200, answer.body
                answers.append(answer.body["choices"][0]["token_ids"])
            return answers
        finally:
            await replica.stop()

    return asyncio.run(ask())


def test_a_merged_adapter_answers_with_the_tokens_of_transformers(tmp_path: Path) -> None:
    config = small_finetune(tmp_path, max_steps=30)
    tuned = finetune(config, InProcessHost(), Console(file=io.StringIO())).model
    asked = prompts(tuned)
    expected = by_transformers(tuned, asked)
    assert expected != by_transformers(config.model, asked)  # it did learn
    assert by_vllm(tuned, asked) == expected

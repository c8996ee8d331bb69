"""Chats, and models to learn them, small enough for tests."""

from pathlib import Path
from typing import Any

from phi4ray.config import validated
from phi4ray.train.config import FinetuneConfig
from phi4ray.train.tiny import make_tiny_model
from tests.small_jobs import write_lines

SUMS = [
    {"prompt": f"{a}+{b}", "completion": str(a + b), "id": f"{a}-{b}"}
    for a in range(6)
    for b in range(6)
]

PHI_4 = (
    "{% for message in messages %}{% if (message['role'] == 'system') %}"
    "{{'<|im_start|>system<|im_sep|>' + message['content'] + '<|im_end|>'}}"
    "{% elif (message['role'] == 'user') %}"
    "{{'<|im_start|>user<|im_sep|>' + message['content'] + '<|im_end|>'}}"
    "{% elif (message['role'] == 'assistant') %}"
    "{{'<|im_start|>assistant<|im_sep|>' + message['content'] + '<|im_end|>'}}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
"""How microsoft/phi-4 writes chats."""

PHI_4_FIRST = (
    "{% for message in messages %}{% if (message['role'] == 'system') %}"
    "{{'<|im_start|>system<|im_sep|>' + message['content'] + '<|im_end|>'}}"
    "{% elif (message['role'] == 'user') %}"
    "{{'<|im_start|>user<|im_sep|>' + message['content'] + '<|im_end|><|im_start|>assistant"
    "<|im_sep|>'}}"
    "{% elif (message['role'] == 'assistant') %}{{message['content'] + '<|im_end|>'}}"
    "{% endif %}{% endfor %}"
)
"""How its first version did: a question always opens an answer."""

ENDED = PHI_4.removesuffix("{% endif %}") + "{% else %}{{ eos_token }}{% endif %}"
"""With an end token behind the whole chat, as microsoft/Phi-4-mini-instruct has it."""


def small_model(folder: Path) -> Path:
    return make_tiny_model(folder, hidden_size=128, num_hidden_layers=1, max_model_len=512)


def small_finetune(folder: Path, **changes: Any) -> FinetuneConfig:
    """Twelve steps on 36 sums, from `<folder>/chats.jsonl` to `<folder>/out`."""
    write_lines(folder / "chats.jsonl", SUMS)
    base = {
        "input": (f"{folder}/chats.jsonl",),
        "output": f"{folder}/out",
        "model": str(small_model(folder / "model")),
        "max_steps": 12,
        "per_device_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "checkpoint_every_steps": 4,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "gpus_per_worker": 0,
        "dtype": "float32",
    }
    return validated(FinetuneConfig, base, changes)

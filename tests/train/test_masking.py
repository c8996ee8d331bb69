"""Only answers are learned, each with the token that ends it, whatever the chat template does."""

import copy
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AddedToken, AutoTokenizer

from phi4ray.train.chats import Chat, Place, Refused
from phi4ray.train.masking import IGNORED, Example, to_example
from phi4ray.train.tiny import make_tiny_model
from tests.chat_models import ENDED, PHI_4, PHI_4_FIRST

TEMPLATES = [PHI_4, PHI_4_FIRST, ENDED]
HERE = Place("chats.jsonl", 0)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = make_tiny_model(
        tmp_path_factory.mktemp("models") / "tiny", hidden_size=128, num_hidden_layers=1
    )
    return AutoTokenizer.from_pretrained(folder)


def chat(*turns: str, system: str | None = None) -> Chat:
    """A chat of questions and answers in turn."""
    messages = [{"role": "system", "content": system}] if system else []
    for at, text in enumerate(turns):
        messages.append({"role": "assistant" if at % 2 else "user", "content": text})
    return Chat(HERE, messages)


def learned(example: Example | Refused, tokenizer: Any) -> list[str]:
    """The stretches of a chat that are learned, as text."""
    assert isinstance(example, Example)
    found: list[list[int]] = []
    before = IGNORED
    for token, label in zip(example.input_ids, example.labels, strict=True):
        assert label in (IGNORED, token)
        if label != IGNORED:
            if before == IGNORED:
                found.append([])
            found[-1].append(label)
        before = label
    return [tokenizer.decode(stretch) for stretch in found]


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_answer_is_learned_up_to_its_end_token(tokenizer: Any, template: str) -> None:
    tokenizer.chat_template = template
    asked = chat("Hello", "Hi there!", "2+2?", "It is 4.\n", system="You are brief.")
    example = to_example(asked, tokenizer, 1000)
    assert learned(example, tokenizer) == ["Hi there!<|im_end|>", "It is 4.\n<|im_end|>"]


def test_the_tokens_are_those_that_a_served_model_is_given(tokenizer: Any) -> None:
    tokenizer.chat_template = PHI_4
    asked = chat("2+2?", "4", system="You are brief.")
    example = to_example(asked, tokenizer, 1000)
    assert isinstance(example, Example)
    prompt = tokenizer.apply_chat_template(
        asked.messages[:-1], add_generation_prompt=True, return_dict=False
    )
    assert example.input_ids == [*prompt, *tokenizer.encode("4<|im_end|>")]
    assert example.labels[: len(prompt)] == [IGNORED] * len(prompt)


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="<|>"), min_size=1, max_size=30)
ANSWER = TEXT.filter(str.strip)


@given(
    turns=st.lists(st.tuples(TEXT, ANSWER), min_size=1, max_size=4),
    template=st.sampled_from(TEMPLATES),
)
def test_any_answers_are_learned_and_nothing_else(
    tokenizer: Any, turns: list[tuple[str, str]], template: str
) -> None:
    tokenizer.chat_template = template
    example = to_example(chat(*(text for turn in turns for text in turn)), tokenizer, 10_000)
    assert learned(example, tokenizer) == [f"{answer}<|im_end|>" for _, answer in turns]


@pytest.mark.parametrize("template", TEMPLATES)
def test_an_answer_of_weight_0_is_there_and_not_learned(tokenizer: Any, template: str) -> None:
    tokenizer.chat_template = template
    whole = chat("2+2?", "5", "No: 2+2?", "4")
    example = to_example(replace(whole, unlearned=frozenset({1})), tokenizer, 1000)
    assert learned(example, tokenizer) == ["4<|im_end|>"]
    other = to_example(whole, tokenizer, 1000)
    assert isinstance(example, Example)
    assert isinstance(other, Example)
    assert example.input_ids == other.input_ids


def test_a_template_that_trims_answers_is_followed(tokenizer: Any) -> None:
    tokenizer.chat_template = PHI_4.replace("message['content']", "(message['content'] | trim)")
    example = to_example(chat("2+2?", "  4 \n"), tokenizer, 100)
    assert learned(example, tokenizer) == ["4<|im_end|>"]


def test_a_chat_that_would_have_to_be_cut_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = PHI_4
    whole = to_example(chat("2+2?", "4"), tokenizer, 1000)
    assert isinstance(whole, Example)
    length = len(whole.input_ids)
    assert to_example(chat("2+2?", "4"), tokenizer, length) == whole
    refused = to_example(chat("2+2?", "4"), tokenizer, length - 1)
    assert isinstance(refused, Refused)
    assert refused.code == "too_long"
    assert f"has {length} tokens" in str(refused)


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (PHI_4.replace("'<|im_end|>'", "''"), "no end token"),
        (PHI_4.replace("message['content']", "(message['content'] | upper)"), "as it is"),
        (PHI_4.replace("for message in messages", "for message in messages[-1:]"), "another way"),
        ("{{ raise_exception('roles must alternate') }}", "refuses the chat: roles must alternate"),
        # Only what comes before an answer, by itself.
        (
            "{% if messages | length == 1 %}{{ raise_exception('no answer') }}{% endif %}" + PHI_4,
            "refuses the chat: no answer",
        ),
    ],
)
def test_a_template_that_does_not_fit_refuses_the_chat(
    tokenizer: Any, template: str, why: str
) -> None:
    tokenizer.chat_template = template
    refused = to_example(chat("hello", "hi"), tokenizer, 1000)
    assert isinstance(refused, Refused)
    assert (refused.code, why in refused.message) == ("unlearnable", True)


def test_an_end_that_is_special_without_a_role_ends_an_answer(tokenizer: Any) -> None:
    """Phi-4-mini's `<|end|>` is neither its eos nor any other named token."""
    mini = copy.deepcopy(tokenizer)
    mini.add_tokens([AddedToken("<|end|>", special=True)])
    mini.chat_template = PHI_4.replace("<|im_end|>", "<|end|>")
    assert learned(to_example(chat("2+2?", "4"), mini, 100), mini) == ["4<|end|>"]

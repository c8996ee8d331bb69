"""lm-eval over requests of ours. The only importer of lm_eval.

Prompts are sent as token ids, so that the tokens that are scored are those that were counted here.
"""

import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from phi4ray.batch.rows import Request
from phi4ray.errors import ConfigError
from phi4ray.protocol import Json
from phi4ray.train.answering import Answerer
from phi4ray.train.tasks import FILE_BASES, TaskSet, write_file_task

VERSION = version("lm_eval")
MAX_GEN_TOKENS = 1024
"""What a task may generate that does not say: lm-eval's 256 cuts a chat model's thoughts short."""


class RequestModel(TemplateLM):
    """A model that lm-eval can ask, whoever answers."""

    def __init__(self, answer: Answerer, tokenizer: Any, *, max_model_len: int, seed: int) -> None:
        super().__init__()
        self._answer, self.tokenizer = answer, tokenizer
        self.max_length, self._seed = max_model_len, seed

    @property
    def eot_token_id(self) -> int:
        """What stands before a text without a context."""
        return int(self.tokenizer.eos_token_id)

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval knows its cached requests by."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids; a rendered chat has its special tokens in the text."""
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=bool(add_special_tokens))
        return ids

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Render a chat as the checkpoint's own template does."""
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """What the model writes up to a stop sequence, which is cut off."""
        asked = [self._generation(*request.args) for request in requests]
        return self._answer(asked, lambda _, answer: str(answer["choices"][0]["text"]))

    def _generation(self, context: str, settings: Mapping[str, Any]) -> Request:
        given = dict(settings)
        limit = int(given.pop("max_gen_toks", MAX_GEN_TOKENS))
        stop = handle_stop_sequences(given.pop("until", None), eos=None)
        sampled = given.pop("do_sample", given.get("temperature", 0) > 0)
        temperature = given.pop("temperature", 1.0) if sampled else 0.0
        prompt = self.tok_encode(context)
        # A prompt is cut, from its beginning, only where the answer would have under half of all.
        limit = min(limit, max(self.max_length - len(prompt), self.max_length // 2))
        prompt = prompt[-(self.max_length - limit) :]
        body: Json = {
            **given,
            "prompt": prompt,
            "max_tokens": limit,
            "temperature": temperature,
            "seed": self._seed,
        }
        return Request("/v1/completions", body | ({"stop": stop} if stop else {}))

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether greedy decoding would write it."""
        asked = [self._likelihood(context, scored) for _text, context, scored in requests]
        lengths = [len(scored) for _text, _context, scored in requests]

        def read(at: int, answer: Json) -> tuple[float, bool]:
            choice, body = answer["choices"][0], asked[at].body
            if "allowed_token_ids" in body:
                return forced_likelihood(choice["logprobs"]["top_logprobs"][0], body)
            return prompt_likelihood(choice["prompt_logprobs"], body["prompt"], lengths[at])

        return self._answer(asked, read)

    def _likelihood(self, context: list[int], scored: list[int]) -> Request:
        """The request that tells the log-probability of `scored` after `context`.

        A single token, such as a choice's letter, is generated and not given: then choices share
        their context in the prefix cache, and the answer does not grow with it.
        """
        body: Json = {"max_tokens": 1, "temperature": 0.0}
        if len(scored) == 1:
            body |= {
                "prompt": context[-(self.max_length - 1) :],
                "allowed_token_ids": scored,
                "logprobs": 1,
                "return_tokens_as_token_ids": True,
            }
        else:  # one token must be generated, and must have room
            prompt = (context + scored)[-(self.max_length - 1) :]
            body |= {"prompt": prompt, "prompt_logprobs": 0}
        return Request("/v1/completions", body)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, each token seen with as much before it as fits."""
        pieces: list[tuple[Any, list[int], list[int]]] = []
        owners = []
        for at, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1,
                context_len=1,
            )
            for window in windows:
                pieces.append((None, *make_disjoint_window(window)))
                owners.append(at)
        totals = [0.0] * len(requests)
        for at, (found, _greedy) in zip(owners, self._loglikelihood_tokens(pieces), strict=True):
            totals[at] += found
        return totals


def forced_likelihood(top_logprobs: Mapping[str, float], body: Json) -> tuple[float, bool]:
    """Log-probability of the one token that was allowed, and whether it would come by itself.

    `top_logprobs` has it and the likeliest, as `token_id:N`, before any was ruled out.
    """
    (token,) = body["allowed_token_ids"]
    found = top_logprobs[f"token_id:{token}"]
    return found, found >= max(top_logprobs.values())


def prompt_likelihood(
    prompt_logprobs: Sequence[Mapping[Any, Any] | None], prompt: Sequence[int], count: int
) -> tuple[float, bool]:
    """Sum of the last `count` prompt tokens' log-probabilities, and whether each ranks first.

    `prompt_logprobs` is vLLM's: for each token but the first, its own id's entry.
    """
    total, greedy = 0.0, True
    count = min(count, len(prompt) - 1)
    for entries, token in zip(prompt_logprobs[-count:], prompt[-count:], strict=True):
        # The ids are numbers in process, and text in JSON.
        entry = {int(key): value for key, value in (entries or {}).items()}[token]
        total += entry["logprob"]
        greedy = greedy and entry["rank"] == 1
    return total, greedy


def run_tasks(
    model: RequestModel,
    tasks: Sequence[str],
    way: TaskSet,
    *,
    data: Mapping[str, Path],
    limit: int | None,
    num_fewshot: int | None,
    chat: bool,
    seed: int,
    run_code: bool,
) -> Json:
    """Evaluate tasks, those in `data` over a local file; returns lm-eval's results.

    Raises:
        ConfigError: lm-eval has no such task, or its data cannot be had.
    """
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    if run_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    sampling = None
    if way.temperature is not None:
        sampling = {"do_sample": True, "temperature": way.temperature}
    with tempfile.TemporaryDirectory(prefix="phi4ray-tasks-") as folder:
        manager = task_manager()
        specs = [_spec(manager, Path(folder), task, data.get(task)) for task in tasks]
        try:
            manager.load(specs)
        except Exception as error:  # whatever the hub's client raises without a network
            raise ConfigError(
                f"the data of {', '.join(tasks)} cannot be loaded: {error}. Where there is no "
                "network, name a local file of them: --data TASK=FILE"
            ) from error
        results: Json = lm_eval.simple_evaluate(
            model=model,
            tasks=specs,
            task_manager=manager,
            num_fewshot=num_fewshot,
            limit=limit,
            gen_kwargs=sampling,
            apply_chat_template=chat or way.chat,
            fewshot_as_multiturn=chat or way.chat,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
            bootstrap_iters=1000,
            confirm_run_unsafe_code=run_code,
        )
    # Groups have their members in the results, tags have not.
    members = {
        task: sorted(manager.task_index[task].tags) for task in tasks if task in manager.all_tags
    }
    return results | {"group_subtasks": results.get("group_subtasks", {}) | members}


@cache
def task_manager() -> TaskManager:
    """lm-eval's index of its tasks, which takes seconds to make: of 14,000 files."""
    return TaskManager()


def _spec(manager: TaskManager, folder: Path, task: str, data: Path | None) -> str:
    known = manager.task_index
    if task not in known:
        raise ConfigError(f"lm-eval has no task {task!r}: see `lm_eval ls tasks`")
    if data is None:
        return task
    member = FILE_BASES.get(task, task)
    definition = known[member].yaml_path
    if member not in manager.all_subtasks or definition is None:
        raise ConfigError(f"{task!r} is no single task: name one of its members with --data")
    return str(write_file_task(folder, task, Path(definition), data))

"""Whatever a config file holds, it is a configuration or a `ConfigError` that names the file."""

from collections.abc import Callable
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from phi4ray.config import Config, batch_config, load_yaml
from phi4ray.errors import ConfigError
from phi4ray.serve.config import serve_config
from phi4ray.serve.tenants import parse
from tests.fuzz import budget, near, texts, values

pytestmark = pytest.mark.slow

BATCH = {
    "input": ["a"], "output": "b", "engine": {"kind": "fake", "model": "m"}, "shard_rows": 3,
    "sampling": {"n": 1}, "max_row_mib": 1.0, "max_columns": 3, "gpu_hour_price": 2.5,
}  # fmt: skip
SERVE = {
    "name": "phi4", "engine": {"kind": "fake", "model": "m"}, "recipe": "phi-4-mini-rtx4090",
    "gate": {"keys_file": None}, "admission": {}, "autoscaling": {}, "routing": {}, "harvest": {},
    "batches": {"store": "b", "completion_windows": ["24h"]}, "drain_timeout_s": 3.0,
}  # fmt: skip
TENANT = {
    "name": "acme", "key_sha256": ["0" * 64], "requests_per_minute": 3, "tokens_per_minute": 1.5,
    "max_concurrency": 2, "priority": 0, "models": ["m"], "disabled": False,
}  # fmt: skip

words = st.sampled_from(
    ["a", "b:", "- ", "? ", ": ", "{", "}", "[", "]", "&a ", "*a", "<<: ", "|\n", "!!set", "!!int ",
     "!!binary ", "!!float ", "!!timestamp ", "!!omap ", "!!bool ", "!!python/object:os.system ",
     "\n", "  ", "\t", "#", "'", '"', "%YAML", "---\n", "2020-13-45", "12:99:99", "0x", "1e999",
     ".nan", "~", "1" * 5000, "\x00", "\ufeff", "\ud800"]
)  # fmt: skip
yamls = st.lists(words | texts, max_size=8).map("".join)


def refusal(function: Callable[[], Any]) -> str | None:
    try:
        function()
    except ConfigError as error:
        return str(error)
    return None


@budget(300)
@given(yamls)
@example("a: 2020-13-45")
@example("a: " + "1" * 5000)
@example("a: &a [*a]")
@example("sampling: &a {b: *a}")
@example("a: !!float ''")
def test_yaml_of_any_content_is_a_mapping_or_names_its_file(text: str) -> None:
    said = refusal(lambda: load_yaml(text, "job.yaml"))
    assert said is None or said.startswith("job.yaml ")


def written(value: Any) -> str:
    text: str = yaml.safe_dump(value, allow_unicode=True)
    return text


@pytest.mark.parametrize(("valid", "make"), [(BATCH, batch_config), (SERVE, serve_config)])
def test_settings_of_any_kind_are_taken_or_refused_by_name(
    valid: dict[str, Any], make: Callable[..., Config]
) -> None:
    nested = st.builds(
        lambda name, inner: {**valid, name: inner},
        st.sampled_from([name for name, value in valid.items() if isinstance(value, dict)]),
        near({"kind": "fake", "model": "m", "env": {"A": "b"}, "engine_args": {}}),
    )

    @budget(150)
    @given(near(valid) | nested)
    @example(valid | {"recipe": ["phi-4"]})
    @example(valid | {"engine": {"kind": "fake", "model": "m", "engine_args": {"\ud800": 1}}})
    @example(valid | {"drain_timeout_s": float("inf"), "shard_mib": float("inf")})
    def check(settings: dict[str, Any]) -> None:
        said = refusal(lambda: make(settings))
        if said is None:
            config = make(settings)
            assert type(config).model_validate_json(config.model_dump_json()) == config
        else:
            assert said

    check()


@budget(200)
@given(
    st.lists(near(TENANT), max_size=2).map(lambda found: written({"tenants": found}))
    | values.map(written)
    | yamls
)
def test_keys_files_of_any_content_are_read_or_named(text: str) -> None:
    said = refusal(lambda: parse(text, "keys.yaml"))
    assert said is None or said.startswith("keys.yaml ")

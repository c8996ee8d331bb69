"""The plan: every row in one part, one name a part, and no other job's answers beside them."""

import datetime
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi4ray.batch.identity import check_same_engine, check_same_job, identity_of
from phi4ray.batch.plan import (
    Input,
    Plan,
    Slice,
    is_answer,
    make_plan,
    pack,
    read_plan,
    take,
)
from phi4ray.config import BatchConfig, batch_config
from phi4ray.errors import ConfigError, PlanMismatchError

slices = st.lists(
    st.builds(
        Slice,
        file=st.just(0),
        row_start=st.just(0),
        rows=st.integers(1, 50),
        size=st.integers(0, 5000),
    ),
    max_size=30,
)


def settings(**changes: Any) -> BatchConfig:
    base = {"input": ("in/",), "output": "out", "engine": {"kind": "fake", "model": "tiny"}}
    return batch_config(base, changes)


def plan_of(config: BatchConfig, inputs: Sequence[Input]) -> Plan:
    pieces = [Slice(file=file, row_start=0, rows=10) for file in range(len(inputs))]
    return make_plan(identity_of(config, None), inputs, list(pack(pieces, 10, 1 << 20)), carried="")


INPUTS = [Input(uri=f"s3://in/{name}.jsonl", size=5, etag="e1") for name in "abc"]


class TestPack:
    @given(slices, st.integers(1, 60), st.integers(1, 6000))
    def test_shards_hold_every_slice_in_order(
        self, pieces: list[Slice], rows: int, size: int
    ) -> None:
        shards = list(pack(pieces, rows, size))
        assert [piece for shard in shards for piece in shard.slices] == pieces
        assert [shard.index for shard in shards] == list(range(len(shards)))

    @given(slices, st.integers(1, 60), st.integers(1, 6000))
    def test_a_shard_keeps_both_limits_unless_it_is_one_slice(
        self, pieces: list[Slice], rows: int, size: int
    ) -> None:
        for shard in pack(pieces, rows, size):
            within = shard.rows <= rows and sum(piece.size for piece in shard.slices) <= size
            assert within or len(shard.slices) == 1

    @given(slices, st.integers(1, 60), st.integers(1, 6000))
    def test_a_shard_ends_only_where_the_next_slice_does_not_fit(
        self, pieces: list[Slice], rows: int, size: int
    ) -> None:
        shards = list(pack(pieces, rows, size))
        for shard, following in itertools.pairwise(shards):
            more = (*shard.slices, following.slices[0])
            assert sum(p.rows for p in more) > rows or sum(p.size for p in more) > size


class TestTake:
    @given(slices, st.integers(1, 400))
    def test_a_limit_takes_exactly_that_many_rows_or_all(
        self, pieces: list[Slice], limit: int
    ) -> None:
        taken = list(take(pieces, limit))
        assert sum(piece.rows for piece in taken) == min(limit, sum(p.rows for p in pieces))
        assert all(piece.rows > 0 for piece in taken)
        assert taken[:-1] == pieces[: len(taken)][:-1]

    def test_without_a_limit_all_slices_stay(self) -> None:
        pieces = [Slice(file=0, row_start=at, rows=3) for at in (0, 3)]
        assert list(take(pieces, None)) == pieces

    def test_a_slice_cut_short_counts_the_bytes_of_its_rows_only(self) -> None:
        cut = list(take([Slice(file=0, row_start=0, rows=10, size=1000)], 3))
        assert [(piece.rows, piece.size) for piece in cut] == [(3, 300)]


class TestNames:
    def test_a_part_is_found_by_the_name_it_was_given(self) -> None:
        plan = plan_of(settings(), INPUTS)
        assert [plan.shard_of(plan.part_name(index)) for index in range(3)] == [0, 1, 2]

    def test_no_other_object_is_taken_for_a_part(self) -> None:
        plan = plan_of(settings(), INPUTS)
        other = plan_of(settings(limit=5), INPUTS)
        name = plan.part_name(0)
        strangers = [
            plan.part_name(3),  # no such shard
            other.part_name(0),
            name.replace("part-000000", "part-0000000"),
            plan.part_name(1).replace("part-000001", "part-00000\u0661"),
            f"more/{name}",
            f"{name}.tmp",
            "_plan.json",
            "",
        ]
        assert [plan.shard_of(stranger) for stranger in strangers] == [None] * len(strangers)

    def test_answers_are_known_by_their_names_whatever_plan_they_are_of(self) -> None:
        plan = plan_of(settings(), INPUTS)
        stem = f"part-000007-{plan.plan_id}"
        names = [plan.part_name(1), f"_parts/{plan.part_name(1)}"]
        names += [f"{stem}.output.jsonl", f"{stem}.errors.jsonl"]
        assert all(is_answer(name) for name in names)
        others = ["part-000000.parquet", "prompts.jsonl", f"x/{plan.part_name(1)}", f"{stem}.jsonl"]
        assert not any(is_answer(name) for name in others)


class TestPlanId:
    def test_the_same_job_has_the_same_plan_to_the_byte(self) -> None:
        one, other = plan_of(settings(), INPUTS), plan_of(settings(), INPUTS)
        assert one.model_dump_json() == other.model_dump_json()

    @pytest.mark.parametrize(
        "changes",
        [
            {"engine": {"model": "other"}},
            {"engine": {"revision": "main"}},
            {"engine": {"served_model_name": "other"}},
            {"engine": {"engine_args": {"hf_overrides": {"a": 1}}}},
            {"sampling": {"temperature": 0.5}},
            {"system_prompt": "be brief"},
            {"endpoint": "/v1/completions"},
            {"limit": 5},
            {"output_format": "openai-jsonl"},
        ],
    )
    def test_what_decides_answers_decides_the_id(self, changes: dict[str, Any]) -> None:
        assert plan_of(settings(**changes), INPUTS).plan_id != plan_of(settings(), INPUTS).plan_id

    @pytest.mark.parametrize(
        "changes",
        [
            {"engine": {"gpu_memory_utilization": 0.5, "tensor_parallel_size": 2}},
            {"max_replicas": 4, "min_replicas": 2, "shards_in_flight": 3},
            {"max_attempts": 9, "request_timeout_s": 5, "max_error_fraction": 0.1},
            {"retry_errors": True},
        ],
    )
    def test_what_decides_only_speed_does_not(self, changes: dict[str, Any]) -> None:
        assert plan_of(settings(**changes), INPUTS).plan_id == plan_of(settings(), INPUTS).plan_id

    def test_an_input_that_changed_makes_another_id(self) -> None:
        changed = [*INPUTS[:2], INPUTS[2].model_copy(update={"etag": "e2"})]
        assert plan_of(settings(), changed).plan_id != plan_of(settings(), INPUTS).plan_id

    def test_inputs_are_sealed_with_their_planned_rows(self) -> None:
        plan = plan_of(settings(), INPUTS)
        assert [item.rows for item in plan.inputs] == [10, 10, 10]
        assert plan.rows == 30


class TestReadPlan:
    def test_a_plan_survives_being_written_and_read(self) -> None:
        plan = plan_of(settings(sampling={"stop": ["\n\n"], "temperature": 0.7}), INPUTS)
        assert read_plan(plan.model_dump_json().encode(), "u") == plan

    @pytest.mark.parametrize("data", [b"", b"{}", b"\xff", b'{"version": 1, "plan_id": "x"}'])
    def test_what_is_no_plan_is_refused_by_name(self, data: bytes) -> None:
        with pytest.raises(ConfigError, match=r"_plan\.json is not a plan"):
            read_plan(data, "s3://out/_plan.json")


class TestSameJob:
    def check(self, config: BatchConfig, inputs: Sequence[Input] = INPUTS) -> None:
        check_same_job(plan_of(settings(), INPUTS), identity_of(config, None), inputs)

    def test_the_same_job_may_go_on(self) -> None:
        self.check(settings())

    def test_it_may_not_go_on_with_other_files_of_its_model(self) -> None:
        def identity(files: str | None) -> dict[str, Any]:
            return identity_of(settings(), None, files)

        plan = make_plan(identity("a1"), INPUTS, [], carried="")
        old = make_plan(identity(None), INPUTS, [], carried="")
        assert (
            old.plan_id == make_plan(identity_of(settings(), None), INPUTS, [], carried="").plan_id
        )
        for same, files in ((plan, "a1"), (plan, None), (old, "a1"), (old, None)):
            check_same_job(same, identity(files), INPUTS)
        with pytest.raises(
            PlanMismatchError, match=r"the files of engine\.model 'tiny' are others"
        ):
            check_same_job(plan, identity("b2"), INPUTS)

    def test_a_slash_at_the_end_of_a_folder_changes_nothing(self) -> None:
        plan = plan_of(settings(engine={"model": "s3://b/m/"}), INPUTS)
        again = settings(engine={"model": "s3://b/m", "served_model_name": "s3://b/m"})
        check_same_job(plan, identity_of(again, None), INPUTS)

    def test_it_may_go_on_with_other_machines_and_shards(self) -> None:
        self.check(settings(shard_rows=7, max_replicas=9, engine={"gpu_memory_utilization": 0.5}))

    @pytest.mark.parametrize(
        "sampling",
        [
            {"logit_bias": {50256: -100}},  # YAML keys may be numbers
            {"stop": ("a", "b")},
            {"x": datetime.date(2026, 1, 2)},  # and its values dates
        ],
    )
    def test_any_sampling_is_the_same_after_the_plan_was_read_again(
        self, sampling: dict[str, Any]
    ) -> None:
        config = settings(sampling=sampling)
        plan = read_plan(plan_of(config, INPUTS).model_dump_json().encode(), "u")
        check_same_job(plan, identity_of(config, None), INPUTS)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"engine": {"model": "m2"}}, "engine.model was 'tiny' and is now 'm2'"),
            ({"sampling": {"top_p": 0.5}}, "sampling.top_p was None and is now 0.5"),
            ({"limit": 7}, "limit was None and is now 7"),
            ({"endpoint": "/v1/completions"}, "endpoint was '/v1/chat/completions'"),
        ],
    )
    def test_a_setting_that_differs_is_named(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(PlanMismatchError) as caught:
            self.check(settings(**changes))
        assert message in str(caught.value)
        assert "Use a new --output" in str(caught.value)

    def test_any_engine_arguments_are_the_same_after_the_plan_was_read_again(self) -> None:
        arguments = {"sizes": (1, 2), "by_number": {1: "a"}, "since": datetime.date(2026, 1, 2)}
        config = settings(engine={"engine_args": arguments})
        plan = read_plan(plan_of(config, INPUTS).model_dump_json().encode(), "u")
        check_same_job(plan, identity_of(config, None), INPUTS)

    def test_another_engine_does_not_answer_the_rest_and_one_with_other_memory_does(self) -> None:
        engine = {"revision": "a1", "engine_args": {"seed": 3}}
        plan = plan_of(settings(engine=engine), INPUTS)
        plan = read_plan(plan.model_dump_json().encode(), "u")
        check_same_engine(plan, settings(engine=engine | {"gpu_memory_utilization": 0.5}).engine)
        with pytest.raises(PlanMismatchError, match=r"engine\.revision was 'a1' and is now 'b2'"):
            check_same_engine(plan, settings(engine=engine | {"revision": "b2"}).engine)

    def test_a_chat_template_that_differs_is_named(self) -> None:
        plan = plan_of(settings(), INPUTS)
        with pytest.raises(PlanMismatchError, match=r"engine\.chat_template was None"):
            check_same_job(plan, identity_of(settings(), "{{ other }}"), INPUTS)

    def test_inputs_that_differ_are_named_by_how(self) -> None:
        changed = [
            INPUTS[0].model_copy(update={"etag": "e2"}),
            INPUTS[1].model_copy(update={"uri": "s3://in/new.jsonl"}),
            INPUTS[2],
        ]
        with pytest.raises(PlanMismatchError) as caught:
            self.check(settings(), changed)
        message = str(caught.value)
        assert "input s3://in/a.jsonl changed (etag e1 is now e2)" in message
        assert "input s3://in/b.jsonl is gone" in message
        assert "input s3://in/new.jsonl is new" in message
        assert "c.jsonl" not in message

    def test_a_size_that_changed_under_one_etag_is_a_change(self) -> None:
        resized = [INPUTS[0].model_copy(update={"size": 6}), *INPUTS[1:]]
        with pytest.raises(PlanMismatchError, match=r"a\.jsonl changed"):
            self.check(settings(), resized)

    def test_another_order_of_inputs_is_a_change(self) -> None:
        with pytest.raises(PlanMismatchError, match="another order"):
            self.check(settings(), INPUTS[::-1])

    def test_of_many_inputs_only_the_first_are_named(self) -> None:
        many = [Input(uri=f"s3://in/{n}.jsonl", size=1, etag="e") for n in range(20)]
        with pytest.raises(PlanMismatchError) as caught:
            self.check(settings(), [*INPUTS, *many])
        assert str(caught.value).count("is new") == 5
        assert "and 15 more inputs differ" in str(caught.value)

"""What online traffic leaves for batch rows: tokens above a reserve, and steps that stay short."""

import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from phi4ray.serve.slack import (
    AHEAD_STEPS,
    LEAST_AHEAD,
    ONSET,
    REST_S,
    HarvestConfig,
    RecentPeak,
    Slack,
    StepControl,
    slack,
)

CAPACITY = 1000.0


def left(**changes: float | bool) -> Slack:
    """The slack of a replica of 1,000 tokens and 100 sequences, online traffic on it."""
    reserve = changes.pop("reserve_fraction", 0.1)
    given_: dict[str, object] = {
        "capacity_tokens": CAPACITY, "max_num_seqs": 100, "online_tokens": 0.0,
        "online_sequences": 0, "recent_tokens": 0.0, "step_sequences": 1000.0, "idle": False,
        "crowded": False, **changes,
    }  # fmt: skip
    return slack(HarvestConfig(reserve_fraction=float(reserve)), **given_)  # type: ignore[arg-type]


def test_batch_gets_what_is_free_above_the_reserve() -> None:
    assert left(online_tokens=300, recent_tokens=300).tokens == 600


def test_what_online_requests_held_lately_is_kept_for_them() -> None:
    assert left(online_tokens=300, recent_tokens=500).tokens == 400


def test_rows_are_aborted_only_when_online_requests_need_their_tokens() -> None:
    assert left(online_tokens=300, recent_tokens=800).keep_tokens == 700


def test_sequences_are_what_a_step_of_the_wanted_length_has_room_for() -> None:
    found = left(online_sequences=10, step_sequences=50)
    assert (found.sequences, found.keep_sequences) == (40, 40)
    assert left(online_sequences=60, step_sequences=50).keep_sequences == 0


def test_a_waiting_online_request_ends_all_batch() -> None:
    assert left(crowded=True) == Slack(0, 0, 0, 0)


def test_an_idle_replica_is_filled_and_a_few_rows_wait_in_its_engine() -> None:
    assert left(idle=True, recent_tokens=900, step_sequences=3) == Slack(1250, 125, 1250, 125)


load = st.floats(0, 2 * CAPACITY)


@given(load, load, st.integers(0, 200), st.floats(0, 300), st.booleans(), st.booleans())
def test_batch_never_gets_more_than_may_stay(
    online: float, recent: float, sequences: int, step: float, idle: bool, crowded: bool
) -> None:
    found = left(
        online_tokens=online, recent_tokens=max(online, recent), online_sequences=sequences,
        step_sequences=step, idle=idle, crowded=crowded,
    )  # fmt: skip
    assert 0 <= found.tokens <= found.keep_tokens
    assert 0 <= found.sequences <= found.keep_sequences
    if not idle:
        assert found.keep_tokens <= max(0, CAPACITY - online)


@given(load, load, st.integers(0, 99), st.floats(0, 300))
def test_more_online_load_never_leaves_more(
    one: float, other: float, sequences: int, step: float
) -> None:
    low, high = sorted((one, other))
    before = left(online_tokens=low, online_sequences=sequences, step_sequences=step)
    after = left(online_tokens=high, online_sequences=sequences + 1, step_sequences=step)
    assert after.tokens <= before.tokens
    assert after.sequences <= before.sequences


def test_a_peak_counts_half_after_each_half_life() -> None:
    peak = RecentPeak(10)
    assert [peak.observe(v, t) for v, t in ((100, 0), (10, 10), (10, 20), (60, 21))] == [
        100, 50, 25, 60,
    ]  # fmt: skip


class Engine:
    """Steps of `fixed + each * sequences` seconds, and `mixed + prompt * prompt tokens` with any.

    Rows have 512 tokens of prompt and 256 of answer, are never short, and come to the engine
    through a front end that takes `front_s` for each.
    """

    def __init__(
        self, target_s: float, fixed_s: float, each_s: float, prompt_s: float,
        *, mixed_s: float = 0.0, front_s: float = 0.0,
    ) -> None:  # fmt: skip
        self.control = StepControl(target_s, 2048)
        self.fixed_s, self.each_s, self.prompt_s = fixed_s, each_s, prompt_s
        self.mixed_s, self.front_s = mixed_s, front_s
        self.left: dict[int, int] = {}
        self.coming: list[tuple[float, int]] = []
        self.finished = self.aborted = self.fed = self.behind = 0
        self.now_s = 0.0
        self.steps: list[float] = []

    def abort(self) -> None:
        row = max([*self.left, *(row for _, row in self.coming)])
        self.left.pop(row, None)
        self.coming = [one for one in self.coming if one[1] != row]
        self.control.forget(row)
        self.aborted += 1

    def step(self, online: int) -> None:
        now_s = self.now_s
        rows = len(self.left) + len(self.coming)
        if rows > (most := max(0.0, self.control.keep - online)):
            self.control.shrunk()
            while len(self.left) + len(self.coming) > most:
                self.abort()
        while self.control.ready() and len(self.left) + len(self.coming) + online < 1024:
            self.fed += 1
            self.control.feed(self.fed, 512)
            free_s = max([now_s, *(at for at, _ in self.coming)])
            self.coming.append((free_s + self.front_s, self.fed))
        self.behind = max(self.behind, len(self.coming))
        here = [row for at, row in self.coming if at <= now_s]
        self.coming = [one for one in self.coming if one[1] not in here]
        self.left.update(dict.fromkeys(here, 256))
        running = len(self.left) + online
        prompts = self.mixed_s + self.prompt_s * 512 * len(here) if here else 0.0
        self.steps.append(self.fixed_s + self.each_s * running + prompts)
        self.now_s = now_s + self.steps[-1]
        self.control.observe(self.steps[-1], running, len(here))
        self.left = {row: left - 1 for row, left in self.left.items()}
        for row in [row for row, left in self.left.items() if not left]:
            del self.left[row]
            self.control.forget(row)
            self.finished += 1

    def run(self, seconds: float, online: int) -> float:
        """Steps for so long; gives their mean length over the second half."""
        begin, until = len(self.steps), self.now_s + seconds
        while self.now_s < until:
            self.step(online)
        half = self.steps[(begin + len(self.steps)) // 2 :]
        return sum(half) / len(half)


def told(control: StepControl) -> StepControl:
    """The control after a step: it lets nothing in before."""
    assert not control.ready()
    control.observe(None, 1, 1)
    return control


@pytest.mark.slow
@given(
    st.floats(0.003, 0.01), st.floats(1e-5, 1e-4), st.floats(5e-6, 5e-5), st.floats(0.02, 0.08),
    st.integers(0, 40),
)  # fmt: skip
@example(0.0039, 1e-5, 4.78e-5, 0.0547, 0)  # a lump is paid back by a part of a step
@settings(max_examples=20)
def test_steps_beside_batch_last_as_long_as_they_may_and_no_work_is_thrown_away(
    fixed_s: float, each_s: float, prompt_s: float, target_s: float, online: int
) -> None:
    engine = Engine(target_s, fixed_s, each_s, prompt_s)
    mean_s = engine.run(120, online)
    full_s = fixed_s + each_s * 1024 + prompt_s * 2048
    assert mean_s <= 1.1 * target_s
    if full_s > 2 * target_s and 2 * (fixed_s + each_s * online) < target_s:
        assert mean_s >= 0.8 * target_s
    assert engine.aborted <= 0.05 * engine.finished + 20


def test_when_online_requests_make_steps_too_long_rows_go_and_come_back_afterwards() -> None:
    engine = Engine(0.04, fixed_s=0.005, each_s=1e-4, prompt_s=2.5e-5)
    engine.run(60, online=10)
    before = len(engine.left)
    assert before > 50
    engine.run(5, online=500)
    assert not engine.left
    engine.run(60, online=10)
    assert len(engine.left) > 0.8 * before


def test_in_a_burst_no_row_is_fed_into_its_gaps() -> None:
    engine = Engine(0.04, fixed_s=0.005, each_s=1e-4, prompt_s=2.5e-5)
    engine.run(60, online=10)
    engine.run(2, online=500)
    fed = engine.fed
    for _ in range(10):
        engine.run(0.5, online=300)
        engine.run(0.5, online=500)
    assert engine.fed == fed


def test_after_rows_went_none_are_fed_until_steps_have_been_short_for_some_time() -> None:
    control = StepControl(0.05, 1000)
    control.shrunk()
    for step_s in [0.04] * 12 + [0.2]:
        control.observe(step_s, 5, 0)
    steps = 0
    while not control.ready():
        control.observe(0.04, 5, 0)
        steps += 1
    assert steps * 0.04 > REST_S


def test_where_no_sequence_waits_for_a_token_rows_are_fed_again_at_once() -> None:
    control = StepControl(0.05, 1000)
    control.shrunk()
    control.observe(None, 1, 0)
    assert control.ready()


def test_when_rows_must_go_at_least_half_of_them_do() -> None:
    control = StepControl(0.05, 1000)
    for _ in range(100):
        control.observe(0.055, 100, 0)
    assert control.keep == pytest.approx(50)
    for _ in range(100):
        control.observe(0.2, 100, 0)
    assert control.keep == pytest.approx(25)


@pytest.mark.parametrize("steps_s", [[0.04] * 100 + [2.0], [0.04, 0.055] * 100])
def test_a_late_step_and_steps_of_uneven_length_cost_no_row_its_place(steps_s: list[float]) -> None:
    control = StepControl(0.05, 1000)
    for step_s in steps_s:
        control.observe(step_s, 100, 0)
        assert control.keep == math.inf


def test_prompts_go_many_at_once_where_each_step_with_prompts_costs_more() -> None:
    # An H200 with Phi-4 in FP8, as measured (benchmarks/RESULTS.md).
    engine = Engine(0.03, fixed_s=0.0058, each_s=5.5e-5, prompt_s=2.66e-5, mixed_s=0.011)
    mean_s = engine.run(120, online=20)
    assert 0.8 * 0.03 <= mean_s <= 1.1 * 0.03
    # Alone, with 1,024 sequences, it does 33 rows a second; a prompt in every step would leave 13.
    assert engine.finished / sum(engine.steps) > 20
    assert max(engine.steps) < 0.12


def test_a_slow_front_end_never_has_more_than_what_is_fed_at_once() -> None:
    engine = Engine(0.03, fixed_s=0.005, each_s=5e-5, prompt_s=2e-5, front_s=0.02)
    engine.run(60, online=20)
    assert engine.behind <= 4
    assert engine.aborted == 0


def test_rows_that_ended_before_the_engine_began_them_hold_nothing_back() -> None:
    control = told(StepControl(0.05, 1000))
    control.feed("refused", 1000)
    control.observe(0.01, 5, 0)
    assert not control.ready()
    control.forget("refused")
    control.observe(0.01, 5, 0)
    assert control.ready()


def test_what_a_long_step_was_too_long_is_paid_back_before_more_is_fed() -> None:
    control = told(StepControl(0.05, 1000))
    control.feed("row", 1000)
    control.observe(0.1, 5, 1)
    paid = 0
    while not control.ready():
        control.observe(0.04, 5, 0)
        paid += 1
    assert paid == 5


def test_nothing_is_fed_while_more_comes_than_usual_as_long_as_a_lump_would_take() -> None:
    control = told(StepControl(0.05, 1000))
    assert control.lump_s == pytest.approx(0.15)
    assert control.ready(ONSET * 1000 / 0.15 - 1)
    assert not control.ready(ONSET * 1000 / 0.15 + 1)
    assert control.ready(-1e6)  # a burst has ended


def test_an_engine_that_does_not_tell_its_steps_gets_prompts_when_it_has_begun_the_last() -> None:
    control = told(StepControl(0.05, 1000))
    control.feed("row", 1000)
    control.observe(None, 1, 0)
    assert not control.ready()
    control.observe(None, 1, 1)
    assert control.ready()


def test_an_idle_engine_has_rows_to_begin_for_some_steps_and_no_more() -> None:
    control = StepControl(0.05, 1000)

    def fed() -> int:
        rows = 0
        while control.idle_ready():
            control.feed(object(), 1000)
            rows += 1
        return rows

    assert fed() == LEAST_AHEAD
    control.observe(3.0, 20, 5)
    assert fed() == 5  # however long its steps are
    control.observe(3.0, 60, 40)
    assert fed() == 40 + AHEAD_STEPS * 40 - LEAST_AHEAD
    for _ in range(1000):
        control.observe(0.01, 60, 0)
    assert fed() == 0
    for _ in range(int(AHEAD_STEPS * 40)):
        control.observe(0.01, 60, 1)
    assert fed() == LEAST_AHEAD

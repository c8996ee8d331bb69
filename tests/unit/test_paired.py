"""Paired comparisons: exact where arithmetic can check them, and never surer than the samples."""

import math
from statistics import NormalDist

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from phi4ray.train.paired import compare, mcnemar_p, proportion_interval, verdict

counts = st.integers(0, 60)
binary = st.lists(st.tuples(st.sampled_from((0.0, 1.0)), st.sampled_from((0.0, 1.0))), min_size=1)
shares = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=40)


def tail_by_definition(gained: int, lost: int) -> float:
    """Probability of a split at least as uneven, summed term by term."""
    n = gained + lost
    uneven = abs(gained - lost)
    return sum(math.comb(n, k) for k in range(n + 1) if abs(n - 2 * k) >= uneven) / 2**n


@given(counts, counts)
def test_mcnemars_p_is_the_probability_of_a_split_as_uneven(gained: int, lost: int) -> None:
    assert mcnemar_p(gained, lost) == pytest.approx(tail_by_definition(gained, lost))


def test_mcnemars_p_of_a_textbook_split() -> None:
    # 2 of 12 discordant pairs: 2 * (1 + 12 + 66) / 4096.
    assert mcnemar_p(2, 10) == mcnemar_p(10, 2) == pytest.approx(158 / 4096)


def test_mcnemars_p_is_exact_for_as_many_samples_as_mmlu_has() -> None:
    assert 0 < mcnemar_p(6800, 7242) < 0.001


def test_the_interval_of_proportions_is_agrestis_and_mins() -> None:
    # By hand: (9.5 - 3.5) / 102, and sqrt(13 - 36 / 102) / 102 a standard error.
    low, high = proportion_interval(9, 3, 100, 0.95)
    centre, error = 6 / 102, math.sqrt(13 - 36 / 102) / 102
    reach = NormalDist().inv_cdf(0.975) * error
    assert (low, high) == pytest.approx((centre - reach, centre + reach))


@given(counts, counts, st.integers(0, 2000))
def test_an_interval_of_proportions_has_width_and_stays_in_range(
    gained: int, lost: int, same: int
) -> None:
    samples = gained + lost + same
    assume(samples)
    low, high = proportion_interval(gained, lost, samples, 0.95)
    assert -1 <= low < high <= 1
    wider = proportion_interval(gained, lost, samples, 0.99)
    assert wider[0] <= low
    assert high <= wider[1]


@given(binary)
def test_right_and_wrong_answers_are_compared_by_mcnemar(pairs: list[tuple[float, float]]) -> None:
    found = compare([a for a, _ in pairs], [b for _, b in pairs])
    assert found.test == "McNemar exact"
    assert found.samples == len(pairs)
    assert found.difference == pytest.approx((found.gained - found.lost) / len(pairs))
    assert found.gained == sum(a < b for a, b in pairs)


@given(binary)
def test_the_other_way_round_all_is_mirrored(pairs: list[tuple[float, float]]) -> None:
    there = compare([a for a, _ in pairs], [b for _, b in pairs])
    back = compare([b for _, b in pairs], [a for a, _ in pairs])
    assert there.p_value == back.p_value
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low))
    turned = there.scaled(-1)
    assert (turned.gained, turned.lost) == (back.gained, back.lost)
    assert (turned.difference, turned.low) == pytest.approx((back.difference, back.low))


def test_other_scores_are_compared_by_resampling_and_alike_each_time() -> None:
    base = [0.1 * (i % 7) for i in range(60)]
    better = [score + 0.05 + 0.01 * (i % 3) for i, score in enumerate(base)]
    found = compare(base, better, seed=3)
    assert found == compare(base, better, seed=3)
    assert found.test == "paired bootstrap"
    assert found.low < found.difference < found.high
    assert found.low > 0.05
    assert found.p_value < 0.001


def test_resampling_finds_nothing_where_nothing_is() -> None:
    base = [0.1 * (i % 9) for i in range(60)]
    noisy = [score + (0.1 if i % 2 else -0.1) for i, score in enumerate(base)]
    found = compare(base, noisy)
    assert found.low < 0 < found.high
    assert found.p_value > 0.2


def test_scores_that_are_all_the_same_have_no_difference() -> None:
    found = compare([0.5, 0.25], [0.5, 0.25])
    assert (found.low, found.difference, found.high, found.p_value) == (0, 0, 0, 1)


@pytest.mark.parametrize(("base", "against"), [([], []), ([1.0], [1.0, 0.0])])
def test_what_is_not_paired_is_refused(base: list[float], against: list[float]) -> None:
    with pytest.raises(ValueError, match="cannot be paired"):
        compare(base, against)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (-0.4, 0.3, "pass"),
        (0.1, 0.9, "pass"),
        (-0.6, 0.3, "undecided"),
        (-0.6, -0.5, "undecided"),
        (-1.5, -0.6, "fail"),
    ],
)
def test_a_verdict_is_only_as_sure_as_the_interval(low: float, high: float, expected: str) -> None:
    assert verdict(low, high, 0.5) == expected


def test_a_small_sample_without_any_change_proves_no_half_point() -> None:
    same = [1.0, 0.0] * 20
    found = compare(same, same).scaled(100)
    assert verdict(found.low, found.high, 0.5) == "undecided"

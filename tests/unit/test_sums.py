"""The problems of the circle: held out for real, and the same every time."""

import pytest

from phi4ray.train.sums import Sum, held_out_sums, training_sums


def test_no_training_has_a_held_out_sum_nor_its_mirror() -> None:
    trained = set(training_sums(20_000))
    tested = held_out_sums(2_000)
    assert len(set(tested)) == len(tested) == 2_000
    assert not trained & set(tested)
    assert not trained & {Sum(problem.b, problem.a) for problem in tested}


def test_a_tenth_is_held_out_of_every_length() -> None:
    for low, high in ((10, 100), (100, 1000)):
        pairs = [Sum(a, b) for a in range(low, high, 7) for b in range(low, high, 3)]
        assert sum(pair.held_out for pair in pairs) == pytest.approx(0.1 * len(pairs), rel=0.25)


def test_they_are_the_same_every_time_and_others_with_another_seed() -> None:
    assert training_sums(50) == training_sums(50)
    assert held_out_sums(50) == held_out_sums(50)[:50]
    assert training_sums(50) != training_sums(50, seed=1)


def test_the_answer_is_the_sum() -> None:
    assert (Sum(57, 8).question, Sum(57, 8).answer) == ("Q: 57+8?\nA:", "65")
    assert {len(str(problem.a)) for problem in training_sums(200)} == {1, 2, 3}

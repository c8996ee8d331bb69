"""Scores of two models side by side, in the table of lm-eval, and what the comparison comes to."""

import pytest

from phi4ray.errors import InputError
from phi4ray.train.scores import Measured, Report, Score, compare_samples
from phi4ray.train.tables import comparison_table, markdown_table, score_table, verdict_line


def measured(model: str, *values: float) -> Measured:
    filters = ("flexible-extract", "strict-match")
    scores = tuple(
        Score(
            task="gsm8k",
            version="3.0",
            filter=name,
            n_shot="5",
            metric="exact_match",
            higher_is_better=True,
            value=value,
            stderr=0.0256,
        )
        for name, value in zip(filters, values, strict=False)
    )
    return Measured(model=model, scores=scores, samples={"gsm8k": 100}, seconds=1.0)


def report(**changed: object) -> Report:
    values: dict[str, object] = {
        "base": measured("phi-4", 0.93, 0.92),
        "against": measured("phi-4-fp8", 0.931, 0.92),
        "bound_points": 0.5,
        "confidence": 0.95,
        "settings": {"lm-eval": "0.4.13"},
    }
    return Report.model_validate(values | changed)


def samples(*scores: float, task: str = "gsm8k") -> dict[str, dict[str, float]]:
    return {f"{task},exact_match,strict-match": {f"{task}#{i}": s for i, s in enumerate(scores)}}


def test_one_models_table_is_lm_evals() -> None:
    assert score_table(report(against=None)).splitlines() == [
        "|Tasks|Version|Filter          |n-shot|Metric     |   | Value|   |Stderr|",
        "|-----|------:|----------------|-----:|-----------|---|-----:|---|-----:|",
        "|gsm8k|    3.0|flexible-extract|     5|exact_match|↑  |0.9300|±  |0.0256|",
        "|gsm8k|    3.0|strict-match    |     5|exact_match|↑  |0.9200|±  |0.0256|",
    ]


def test_two_models_stand_side_by_side() -> None:
    head, _, first, second = score_table(report()).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in (head, first, second)]
    assert cells[0][-6:] == ["Base", "", "Stderr", "Against", "", "Stderr"]
    assert cells[1][-6:] == ["0.9300", "±", "0.0256", "0.9310", "±", "0.0256"]
    assert cells[2][-6:] == ["0.9200", "±", "0.0256", "0.9200", "±", "0.0256"]


def test_a_score_that_the_other_model_lacks_leaves_its_place_empty() -> None:
    line = score_table(report(against=measured("other", 0.9))).splitlines()[-1]
    assert [cell.strip() for cell in line.split("|")[1:-1]][-3:] == ["", "", ""]


def test_scores_without_an_error_have_none() -> None:
    one = measured("m", 0.5).scores[0].model_copy(update={"stderr": None, "depth": 1})
    line = score_table(
        report(base=measured("m").model_copy(update={"scores": (one,)}), against=None)
    ).splitlines()[-1]
    assert line.startswith("| - gsm8k|")
    assert "±" not in line


def test_a_table_lines_up() -> None:
    lines = markdown_table(["name", "n"], [["a", "1,000"], ["long name", "2"]]).splitlines()
    assert len({len(line) for line in lines}) == 1


def test_comparisons_are_in_points_and_signed_by_what_is_better() -> None:
    base, worse = samples(*[1.0] * 50, *[0.0] * 50), samples(*[1.0] * 40, *[0.0] * 60)
    (found,) = compare_samples(base, worse, {}, bound_points=0.5, confidence=0.95)
    assert (found.gained, found.lost, found.difference) == (0, 10, -10)
    assert found.verdict == "fail"
    (turned,) = compare_samples(
        base, worse, dict.fromkeys(base, False), bound_points=0.5, confidence=0.95
    )
    assert (turned.gained, turned.lost, turned.difference) == (10, 0, 10)
    assert turned.verdict == "pass"
    assert (turned.low, turned.high) == pytest.approx((-found.high, -found.low))


def test_models_that_answered_other_samples_are_not_compared() -> None:
    for other in (samples(1, 0), {}):
        with pytest.raises(InputError, match="not the same ones"):
            compare_samples(samples(1, 0, 1), other, {}, bound_points=0.5, confidence=0.95)


def test_the_report_is_as_good_as_its_worst_comparison() -> None:
    fine = samples(*[1.0] * 4000, task="mmlu")
    poor = samples(*[1.0] * 100), samples(*[0.0] * 100)
    few = samples(1.0, 0.0)
    kept = {"bound_points": 0.5, "confidence": 0.95}
    good = compare_samples(fine, fine, {}, **kept)
    unsure = compare_samples(few, few, {}, **kept)
    bad = compare_samples(*poor, {}, **kept)
    assert report().verdict is None
    for comparisons, expected in (
        (good, "pass"),
        (good + unsure, "undecided"),
        (good + unsure + bad, "fail"),
    ):
        found = report(comparisons=comparisons)
        assert found.verdict == expected
        assert verdict_line(found).startswith(f"{expected}: ")
        assert "0.5 points" in verdict_line(found)
        assert comparison_table(found).count("\n") == len(comparisons) + 1


def test_a_report_survives_its_json() -> None:
    one = samples(*[1.0] * 10)
    made = report(comparisons=compare_samples(one, one, {}, bound_points=1, confidence=0.9))
    assert Report.model_validate_json(made.model_dump_json()) == made

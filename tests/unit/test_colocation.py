"""Online traffic and batch on one replica, with the speeds of an H200, in virtual time."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest

from phi4ray.recipes import find_recipe
from phi4ray.serve.slack import HarvestConfig

pytestmark = pytest.mark.slow
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def simulation(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("harvest_sim")


def test_rows_whose_answers_take_longer_than_from_one_burst_to_the_next_are_done_all_the_same(
    simulation: ModuleType,
) -> None:
    config = HarvestConfig.model_validate(find_recipe("phi4-fp8-h200").harvest)
    trace = simulation.bursts(0, 46.5, seconds=simulation.SECONDS)
    played = simulation.played(config, trace, batch=True, answer_tokens=2048)
    assert played.aborted > 500
    assert played.batch > 50


def test_with_the_recipe_batch_gets_what_is_left_and_online_requests_hardly_notice(
    simulation: ModuleType,
) -> None:
    config = HarvestConfig.model_validate(find_recipe("phi4-fp8-h200").harvest)
    full = simulation.played(config, [], batch=True)
    capacity = full.batch / full.seconds
    assert capacity == pytest.approx(48.8, rel=0.03)  # rows/s, as measured in run 31
    traces = [simulation.bursts(n, capacity, seconds=simulation.SECONDS) for n in range(2)]
    alone = simulation.figures([simulation.played(config, t, batch=False) for t in traces])
    both = simulation.figures([simulation.played(config, t, batch=True) for t in traces])
    assert both["ttft_p99_ms"] < 1.1 * alone["ttft_p99_ms"]
    assert both["tpot_p99_ms"] < 1.1 * alone["tpot_p99_ms"]
    assert both["batch"] > 0.8 * (capacity - both["online_computed"])
    assert both["online"] + both["batch"] > 3 * alone["online"]

"""The report: one HTML file that loads nothing, with figures that add up."""

import io
import math
import re
from collections.abc import Mapping
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from phi4ray.batch.charts import histogram_chart, line_chart, nice_ticks, quantile, short
from phi4ray.batch.identity import identity_of
from phi4ray.batch.parts import TOKEN_EDGES, Receipt, Result, histogram, make_receipt
from phi4ray.batch.plan import Input, Plan, Shard, Slice, make_plan
from phi4ray.batch.progress import Sample
from phi4ray.batch.report import render_report
from phi4ray.batch.summary import RunFacts, print_summary, summarize
from phi4ray.config import BatchConfig, batch_config

HOSTILE = "<script>alert('1')</script>&\"<!--"
VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """What a browser would make of the report: elements, attributes, cells of tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.tiles: dict[str, str] = {}
        self._text = ""
        self._name = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        self._text = ""

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self._text += data

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag in ("td", "th"):
            self.rows[-1].append(self._text)
        elif tag == "dt":
            self._name = self._text
        elif tag == "dd":
            self.tiles[self._name] = self._text

    def value(self, name: str) -> str:
        """The cell after the one with this text, in a table of two columns."""
        return next(row[1] for row in self.rows if len(row) == 2 and row[0] == name)


def settings(**changes: Any) -> BatchConfig:
    engine: dict[str, Any] = {"model": "microsoft/Phi-4-mini-instruct", "quantization": "fp8"}
    base = {"input": ["s3://in/"], "output": "s3://out/", "sampling": {"temperature": 0.5}}
    return batch_config(base, {"engine": engine}, changes)


def plan_of(config: BatchConfig, parts: int = 2) -> Plan:
    shards = [
        Shard(index=index, slices=(Slice(file=0, row_start=100 * index, rows=100),))
        for index in range(parts)
    ]
    inputs = [Input(uri="s3://in/a.jsonl", size=1, etag="e")]
    return make_plan(identity_of(config, None), inputs, shards, carried="")


def receipt(shard: int, errors: Mapping[str, int] | None = None) -> Receipt:
    codes = [code for code, count in (errors or {}).items() for _ in range(count)]
    rows = [
        Result(
            str(at), "s3://in/a.jsonl", at, prompt_tokens=48, completion_tokens=12, latency_s=1.5
        )
        for at in range(100 - len(codes))
    ]
    rows += [Result(code, "s3://in/a.jsonl", 0, error_code=code) for code in codes]
    return make_receipt("plan", shard, rows, 1.7e9, 1.7e9 + 5)


RUN = RunFacts(
    started_at=1_767_225_600.0,  # 2026-01-01
    elapsed_s=50.0,
    engine_s=40.0,
    first_part_s=15.0,
    rows=200,
    prompt_tokens=9_600,
    completion_tokens=2_400,
    gpu_hours=2.0,
    history=[Sample(float(at), 200.0, 50.0, 0.5, 20, 10, 2) for at in range(0, 50, 5)],
)


def report(
    run: RunFacts = RUN, errors: Mapping[str, int] | None = None, **changes: Any
) -> tuple[str, Page]:
    config = settings(**changes)
    text = render_report(config, plan_of(config), [receipt(0, errors), receipt(1)], run)
    return text, Page(text)


def svgs(text: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]


def test_the_report_loads_nothing_and_runs_nothing() -> None:
    text, page = report(errors={HOSTILE: 3})
    assert not re.search(r"https?://|//cdn|@import|url\(", text)
    assert not {"script", "link", "img", "iframe", "object", "embed", "base"} & set(page.tags)
    assert not {"src", "href", "srcset", "style"} & {name for name, _ in page.attributes}
    assert not [name for name, _ in page.attributes if name.startswith("on")]


def test_the_report_is_whole_html() -> None:
    text, page = report()
    assert text.startswith("<!doctype html>")
    assert page.open == []
    assert ("charset", "utf-8") in page.attributes


def test_the_report_follows_the_readers_choice_of_light_and_dark() -> None:
    text, _ = report()
    assert "prefers-color-scheme: dark" in text


def test_every_chart_is_well_formed_and_named() -> None:
    names = [svg.get("aria-label") for svg in svgs(report()[0])]
    assert names == [
        "Throughput",
        "KV cache in use, mean of the replicas",
        "Requests in the engines",
        "Replicas",
        "Latency of a request",
        "Prompt length",
        "Answer length",
    ]


def test_the_headline_figures_are_the_runs() -> None:
    _, page = report(gpu_hour_price=3.0, errors={"invalid_json": 4})
    assert page.tiles == {
        "rows": "200",
        "error rows": "4",
        "batch size (rows of this run)": "200",
        "total seconds": "50.0",
        "seconds with an engine": "40.0",
        "seconds to the first part": "15.0",
        "requests/s": "5.00",
        "total tokens": "12,000",
        "tokens/s": "300.0",
        "prompt tokens/s": "240.0",
        "output tokens/s": "60.0",
        "cost": "6.00",
        "cost per million tokens": "500.0000",
    }


def test_a_cost_that_cannot_be_known_is_said_to_be() -> None:
    text, page = report()
    assert "Cost: not given" in text
    assert not [name for name in page.tiles if "cost" in name]


def test_errors_are_counted_by_code_over_all_parts() -> None:
    config = settings()
    receipts = [receipt(0, {"timeout": 2, "invalid_json": 1}), receipt(1, {"timeout": 5})]
    page = Page(render_report(config, plan_of(config), receipts, RUN))
    assert page.value("timeout") == "7"
    assert page.value("invalid_json") == "1"


def test_a_job_without_errors_says_so() -> None:
    assert "Every row was answered." in report()[0]


def test_a_hostile_error_code_is_only_text() -> None:
    text, page = report(errors={HOSTILE: 3})
    assert page.value(HOSTILE) == "3"
    assert HOSTILE not in text


def test_hostile_settings_are_only_text() -> None:
    engine = {"model": HOSTILE, "engine_args": {HOSTILE: HOSTILE}, "env": {HOSTILE: "1"}}
    text, page = report(engine=engine, sampling={"stop": [HOSTILE]}, output=f"s3://{HOSTILE}/")
    assert page.value("engine.model") == HOSTILE
    assert HOSTILE not in text
    assert "script" not in page.tags


def test_the_configuration_is_told() -> None:
    config = settings()
    page = report()[1]
    assert page.value("plan") == plan_of(config).plan_id
    assert page.value("engine.quantization") == "fp8"
    assert page.value("sampling") == "temperature=0.5"
    assert page.value("input") == "1 files of s3://in/"
    assert page.value("parts") == "2"
    assert re.search(r"phi4ray \d.*Python 3\.", page.value("versions"))


def test_secrets_are_not_told() -> None:
    engine = {
        "env": {"HF_TOKEN": "S3CRET"},
        "engine_args": {"hf_token": "S3CRET", "nested": {"api_key": "S3CRET"}, "block_size": 16},
    }
    text, page = report(engine=engine)
    assert "S3CRET" not in text
    assert page.value("engine.env.HF_TOKEN") == "set"
    assert page.value("engine.engine_args") == "hf_token=set, nested=api_key=set, block_size=16"
    assert page.value("engine.max_num_batched_tokens") == "16384"


def test_a_long_setting_is_cut() -> None:
    _, page = report(system_prompt="word " * 1000)
    assert page.value("system_prompt").endswith("word … (5,000 characters)")


def test_a_run_that_went_on_from_others_says_what_its_figures_are_of() -> None:
    run = RunFacts(**{name: getattr(RUN, name) for name in RUN.__slots__} | {"rows": 120})
    assert "answers of 120 of 200 rows" in report(run)[0]
    assert "answers of" not in report()[0]


def test_a_run_that_had_nothing_to_do_has_no_speeds_but_the_jobs_distributions() -> None:
    text, page = report(RunFacts(RUN.started_at), gpu_hour_price=3.0)
    assert page.tiles == {"rows": "200", "error rows": "0", "cost": "0.00"}
    assert "This run found every part done." in text
    assert len(svgs(text)) == 3


def test_quantiles_are_over_all_parts() -> None:
    page = report()[1]
    lines = {row[0]: row[1:] for row in page.rows if len(row) == 4}
    assert lines[""] == ["P50", "P95", "P99"]
    assert lines["Latency of a request, seconds"] == ["1.5", "1.95", "1.99"]  # bin from 1 to 2
    assert lines["Prompt length, tokens"] == ["48", "62.4", "63.7"]  # bin from 32 to 64
    assert lines["Answer length, tokens"] == ["12", "15.6", "15.9"]


def test_a_job_whose_every_row_failed_has_a_report() -> None:
    config = settings()
    receipts = [receipt(shard, {"bad": 100}) for shard in (0, 1)]
    text = render_report(config, plan_of(config), receipts, RUN)
    assert text.count("no answered rows") == 3
    assert ["Prompt length, tokens", "–", "–", "–"] in Page(text).rows
    assert len(svgs(text)) == 7


def test_the_summary_on_the_console_has_the_same_figures() -> None:
    config = settings(gpu_hour_price=3.0)
    file = io.StringIO()
    summary = summarize(config, plan_of(config), [receipt(0, {HOSTILE: 4}), receipt(1)], RUN)
    print_summary(Console(file=file, width=200, markup=False, highlight=False), summary)
    printed = file.getvalue()
    for name, value in {"requests/s": "5.00", "total tokens": "12,000", HOSTILE: "4"}.items():
        assert re.search(rf"{re.escape(name)}\s+│\s+{re.escape(value)} │", printed), name
    assert "s3://out/_report.html" in printed


def bars(svg: ElementTree.Element) -> list[str]:
    return [title.text or "" for title in svg.iter("title")]


def test_a_histogram_has_a_bar_for_every_bin_between_the_first_and_the_last() -> None:
    counts = histogram([1, 1, 5, 5, 5, 17], TOKEN_EDGES)
    (svg,) = svgs(histogram_chart("Length", "tokens", counts, TOKEN_EDGES, {}))
    assert bars(svg) == ["2 rows", "0 rows", "3 rows", "0 rows", "1 rows"]
    texts = [text.text for text in svg.iter("text")]
    assert [text for text in texts if text in ("1", "2", "4", "8", "16", "32")][-6:] == [
        "1", "2", "4", "8", "16", "32",
    ]  # fmt: skip


@pytest.mark.parametrize(("value", "ends"), [(0, ("0", "1")), (1_000_000, ("262,144", "∞"))])
def test_values_outside_the_edges_are_drawn(value: int, ends: tuple[str, str]) -> None:
    counts = histogram([value], TOKEN_EDGES)
    (svg,) = svgs(histogram_chart("Length", "tokens", counts, TOKEN_EDGES, {"P50": 0.5}))
    texts = [text.text for text in svg.iter("text")]
    assert bars(svg) == ["1 rows"]
    assert set(ends) <= set(texts)


def test_marks_stand_where_their_value_is() -> None:
    counts = histogram([1, 2, 4, 8], TOKEN_EDGES)
    marks = {"P50": 4.0, "P95": 12.0, "P99": None}
    (svg,) = svgs(histogram_chart("Length", "tokens", counts, TOKEN_EDGES, marks))
    lefts = [float(bar.get("x", "")) for bar in svg.iter("rect")]
    width = float(next(svg.iter("rect")).get("width", ""))
    lines = [float(line.get("x1", "")) for line in svg.iter("line") if line.get("stroke-dasharray")]
    assert lines == pytest.approx([lefts[2] - 1, lefts[3] + width / 2], abs=0.2)
    texts = [text.text for text in svg.iter("text")]
    assert [text for text in texts if text and text.startswith("P")] == ["P50 4", "P95 12"]


@pytest.mark.parametrize(
    ("last_s", "unit"), [(100, "seconds"), (600, "minutes"), (36_000, "hours")]
)
def test_the_time_axis_has_round_numbers_of_a_fitting_unit(last_s: float, unit: str) -> None:
    (svg,) = svgs(line_chart("Speed", "tok/s", [0.0, last_s], {"a": [1.0, 2.0], "b": [0.0, 0.0]}))
    texts = [text.text or "" for text in svg.iter("text")]
    assert f"{unit} since the start of the run" in texts
    assert {"a", "b", "tok/s"} <= set(texts)
    assert "10" in texts or "100" in texts


@pytest.mark.parametrize("values", [[], [0.0], [5.0]])
def test_a_chart_of_hardly_anything_is_a_chart(values: list[float]) -> None:
    seconds = [0.0] * len(values)
    (svg,) = svgs(line_chart("Speed", "tok/s", seconds, {"a": values}))
    assert svg.tag == "svg"


def test_hostile_names_in_a_chart_are_only_text() -> None:
    text = line_chart(HOSTILE, HOSTILE, [0.0, 1.0], {HOSTILE: [1.0, 2.0], "b": [1.0, 2.0]})
    text += histogram_chart(HOSTILE, HOSTILE, [1, 1], [1.0], {HOSTILE: 0.5})
    assert HOSTILE not in text
    assert "script" not in Page(text).tags
    lines, bars = svgs(text)
    assert lines.get("aria-label") == bars.get("aria-label") == HOSTILE
    assert HOSTILE in [text.text for text in lines.iter("text")]


def test_lines_stay_inside_their_chart() -> None:
    seconds, values = [0.0, 7.0, 13.0], [0.0, 99_999.0, 3.0]
    (svg,) = svgs(line_chart("Speed", "tok/s", seconds, {"a": values}))
    _, _, width, height = (float(n) for n in svg.get("viewBox", "").split())
    for point in next(svg.iter("polyline")).get("points", "").split():
        x, y = (float(n) for n in point.split(","))
        assert 0 <= x <= width
        assert 0 <= y <= height


@given(st.floats(1e-6, 1e12))
def test_ticks_are_few_and_reach_the_highest_value(highest: float) -> None:
    ticks = nice_ticks(highest)
    assert ticks[0] == 0
    assert ticks == sorted(ticks)
    assert 4 <= len(ticks) <= 8
    assert ticks[-1] >= highest * (1 - 1e-6)
    assert ticks[-2] < highest


@given(st.lists(st.integers(0, 1 << 18), min_size=1), st.floats(0, 1))
def test_a_quantile_is_in_the_bin_of_the_true_one(values: list[int], share: float) -> None:
    counts = histogram(values, TOKEN_EDGES)
    found = quantile(counts, TOKEN_EDGES, share)
    true = sorted(values)[max(0, math.ceil(share * len(values)) - 1)]
    assert found is not None
    low = max((edge for edge in TOKEN_EDGES if edge <= true), default=0)
    high = min((edge for edge in TOKEN_EDGES if edge > true), default=low)
    assert low <= found <= high


def test_there_is_no_quantile_of_nothing() -> None:
    assert quantile([0, 0, 0], [1.0, 2.0], 0.5) is None


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.25, "0.25"), (999.4, "999"), (999.9, "1k"), (1500, "1.5k"), (2e7, "20M"),
     (999_999, "1M"), (3e9, "3G")],
)  # fmt: skip
def test_numbers_are_short(value: float, text: str) -> None:
    assert short(value) == text

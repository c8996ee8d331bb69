"""The batch job, from inputs to `_SUCCESS`, readable from top to bottom.

    inputs → plan → pending shards → executor → parts → receipts added up → manifest → _SUCCESS

Nothing here knows Ray or vLLM. Every step may be cut off at any point and run again.
"""

import time
from collections.abc import Callable, Container, Iterable, Mapping
from functools import partial

from rich.console import Console

from phi4ray.batch.answers import Done
from phi4ray.batch.executor import TICK_S, Executor, shards_in_flight
from phi4ray.batch.manifest import check_receipts, list_parts, read_receipts, write_manifest
from phi4ray.batch.pacing import rank_of
from phi4ray.batch.parts import Receipt
from phi4ray.batch.plan import PLAN_NAME, REPORT_NAME, SUCCESS_NAME, Plan
from phi4ray.batch.planning import obtain_plan, stored_plan
from phi4ray.batch.progress import Progress
from phi4ray.batch.progress_file import ProgressFile
from phi4ray.batch.report import render_report
from phi4ray.batch.summary import RunFacts, Summary, facts_of, summarize
from phi4ray.batch.tally import Snapshot, Tally
from phi4ray.config import BatchConfig
from phi4ray.errors import ConfigError, ObjectNotFoundError, PlanMismatchError
from phi4ray.storage import join, storage_for


def run_batch(
    config: BatchConfig,
    executor: Executor,
    console: Console,
    publish: Callable[[Snapshot], None] | None = None,
) -> Summary:
    """Run or resume a job; returns when `_SUCCESS` is written.

    `publish` is given every snapshot of the progress, about each `TICK_S`.

    Raises:
        ConfigError: the configuration cannot be run; nothing was started.
        InputError: an input cannot be read, or changed since it was planned.
        PlanMismatchError: the output prefix holds another job's answers.
        TooManyErrorsError: stopped by `max_error_fraction`; finished parts stay.
        EngineError, StorageError, ClusterError: the same command goes on from the finished parts.
    """
    plan = obtain_plan(config, executor, tell=partial(console.print, style="yellow"))
    pending = pending_shards(config, plan)
    done = len(plan.shards) - len(pending)
    console.print(
        f"plan {plan.plan_id}: {plan.rows:,} rows of {len(plan.inputs):,} files in "
        f"{len(plan.shards):,} parts, {done:,} of them done"
    )
    if plan.duplicate_ids:
        console.print(
            f"{plan.duplicate_ids:,} rows repeat an id (first: {plan.duplicate_example}); each is "
            "answered: tell them apart by source_file and source_row",
            style="yellow",
        )
    facts = answer(config, plan, pending, executor, console, publish)
    return finish(config, plan, facts, executor)


def pending_shards(config: BatchConfig, plan: Plan) -> dict[int, Receipt | None]:
    """The shards to run: those without a part, or with `retry_errors` those with failed rows.

    The latter come with the receipt of the part that will be rewritten.

    Raises:
        ConfigError: failed rows of a job that is not finished cannot be rerun.
    """
    parts = list_parts(config.output, plan)
    missing = [shard.index for shard in plan.shards if shard.index not in parts]
    if not config.retry_errors:
        return dict.fromkeys(missing)
    if missing:
        raise ConfigError(
            f"{len(missing)} parts are not written yet: run the job without --retry-errors first"
        )
    receipts = read_receipts(config.output, plan, sorted(parts))
    return {receipt.shard: receipt for receipt in receipts if receipt.error_rows}


def kept(config: BatchConfig, plan: Plan, pending: Container[int]) -> Done:
    """What earlier runs answered and this one leaves: all but the failed rows that it reruns."""
    receipts = read_receipts(config.output, plan, sorted(list_parts(config.output, plan)))
    return sum(
        (
            Done(one.rows - one.error_rows) if one.shard in pending else Done(one.rows, one.errors)
            for one in receipts
        ),
        start=Done(),
    )


def longest_first(plan: Plan, pending: Iterable[int]) -> list[int]:
    """Pending shards in the order in which they go: those with the longest answers first.

    As within a worker (`pacing.rank_of`): a long answer that begins last would be waited for
    alone. Shards alike, and all those of which nothing is known, stay in the order of the inputs.
    """
    return sorted(pending, key=lambda shard: rank_of(plan.shards[shard].longest))


def answer(
    config: BatchConfig,
    plan: Plan,
    pending: Mapping[int, Receipt | None],
    executor: Executor,
    console: Console,
    publish: Callable[[Snapshot], None] | None = None,
) -> RunFacts:
    """Have the pending shards answered and written, showing progress.

    Raises:
        TooManyErrorsError: more of the job's rows failed than `max_error_fraction` allows.
    """
    started_at, began = time.time(), time.monotonic()
    rewritten = {shard: receipt for shard, receipt in pending.items() if receipt is not None}
    rows = sum(r.error_rows if r else plan.shards[shard].rows for shard, r in pending.items())
    before = None
    if config.max_error_fraction is not None:
        before = kept(config, plan, pending)
    tally = Tally(plan.rows, plan.rows - rows, rewritten, before)
    # The same command again is no way around the fraction, even with nothing left to do.
    tally.check_errors(tally.snapshot({}, 0), config.max_error_fraction, final=not pending)
    if not pending:
        return RunFacts(started_at)
    if rewritten and config.shards_in_flight is None:  # of which a few rows each are asked
        at_once = shards_in_flight(config, plan, rows // len(pending))
        config = config.model_copy(update={"shards_in_flight": at_once})
    # What is not whole any more must not look so: rerun parts are about to change.
    storage_for(config.output).delete(join(config.output, SUCCESS_NAME))
    with (
        Progress(console, config.progress_interval_s) as progress,
        ProgressFile(config.output, plan.plan_id, console) as shared,
    ):

        def look(*, final: bool = False) -> Snapshot:
            snapshot = tally.snapshot(executor.stats(), time.monotonic() - began)
            progress.update(snapshot)
            shared.update(progress.window)
            if publish is not None:
                publish(snapshot)
            tally.check_errors(snapshot, config.max_error_fraction, final=final)
            return snapshot

        last = look()
        for receipt in executor.run_shards(config, plan, longest_first(plan, pending)):
            elapsed_s = time.monotonic() - began
            if receipt is not None:
                tally.add(receipt, elapsed_s)
            # Small parts may come by the hundred a second.
            if elapsed_s - last.elapsed_s >= TICK_S:
                last = look()
        last = look(final=True)
    return facts_of(config, tally, last, started_at, progress.history)


def finish(config: BatchConfig, plan: Plan, facts: RunFacts, executor: Executor) -> Summary:
    """Add all receipts up against the plan, then write manifest, report and `_SUCCESS`.

    Raises:
        IncompleteOutputError: a part is missing or not whole.
        PlanMismatchError: another job took the prefix meanwhile.
    """
    receipts: list[Receipt] = read_receipts(
        config.output, plan, sorted(list_parts(config.output, plan))
    )
    check_receipts(plan, receipts)
    if stored_plan(config.output).plan_id != plan.plan_id:
        uri = join(config.output, PLAN_NAME)
        raise PlanMismatchError(f"{uri} was replaced by another job: run that one elsewhere")
    report_uri = join(config.output, REPORT_NAME)
    if facts.rows or not _exists(report_uri):  # a run that had nothing to do has nothing to tell
        report = render_report(config, plan, receipts, facts)
        storage_for(report_uri).write(report_uri, report.encode())
    write_manifest(config, plan, receipts, executor)
    return summarize(config, plan, receipts, facts)


def _exists(uri: str) -> bool:
    try:
        storage_for(uri).head(uri)
    except ObjectNotFoundError:
        return False
    return True

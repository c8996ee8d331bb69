"""A batch job's progress as Prometheus metrics, on the Ray metrics port of the driver's node.

Ray puts `ray_` before each name, and `_total` behind those of counters. A gauge goes 20 s after
its driver, a counter stays as long as the node: what is divided by each other are gauges.
"""

from ray.util.metrics import Counter, Gauge

from phi4ray.batch.tally import Snapshot

JOB = ("output",)


class HighWater:
    """Makes counters of totals that may go back.

    A snapshot's do when a worker is lost, whose open shards will be answered again: nothing is
    counted until those rows are made up for.
    """

    def __init__(self) -> None:
        self._highest: dict[str, int] = {}

    def rise(self, name: str, total: int) -> int:
        """How much a total is above all that came before; 0 where it is not."""
        before = self._highest.get(name, 0)
        self._highest[name] = max(before, total)
        return max(0, total - before)


class JobMetrics:
    """The metrics of one job, which is named by its output prefix."""

    def __init__(self, output: str) -> None:
        self._tags = {"output": output}
        self._water = HighWater()
        self._gauges = {
            name: Gauge(f"phi4ray_batch_{name}", described, JOB)
            for name, described in (
                ("rows_planned", "Rows of the job"),
                ("rows_done", "Rows answered, in earlier runs too"),
                ("rows_resumed", "Those that earlier runs answered"),
                ("rows_in_flight", "Rows that the engines have"),
                ("replicas", "Replicas that report"),
                ("kv_used_fraction", "Share of the KV caches in use, the replicas' mean"),
                ("elapsed_seconds", "Time since this run began"),
            )
        }
        self._rows = Counter("phi4ray_batch_rows", "Rows answered in this run", JOB)
        self._errors = Gauge(
            "phi4ray_batch_error_rows", "Rows without answer in this run", (*JOB, "code")
        )
        self._tokens = Counter(
            "phi4ray_batch_tokens", "Tokens of this run, by kind", (*JOB, "kind")
        )

    def publish(self, snapshot: Snapshot) -> None:
        """Show a snapshot; Ray's agent passes it on within seconds."""
        for name, value in (
            ("rows_planned", snapshot.rows_total),
            ("rows_done", snapshot.rows_done),
            ("rows_resumed", snapshot.rows_resumed),
            ("rows_in_flight", snapshot.rows_in_flight),
            ("replicas", snapshot.replicas),
            ("kv_used_fraction", snapshot.kv_used_fraction),
            ("elapsed_seconds", snapshot.elapsed_s),
        ):
            self._gauges[name].set(value, self._tags)
        for code, rows in snapshot.errors.items():
            self._errors.set(rows, {**self._tags, "code": code})
        if rows := self._water.rise("rows", snapshot.rows_done - snapshot.rows_resumed):
            self._rows.inc(rows, self._tags)
        for kind, total in (
            ("prompt", snapshot.prompt_tokens),
            ("completion", snapshot.completion_tokens),
        ):
            if tokens := self._water.rise(kind, total):
                self._tokens.inc(tokens, {**self._tags, "kind": kind})

"""A batch job's progress as Prometheus metrics, on the Ray metrics port of the driver's node.

Ray puts `ray_` before each name, and `_total` behind those of counters.
"""

from ray.util.metrics import Counter, Gauge

from phi4ray.batch.tally import Snapshot

JOB = ("output",)


class JobMetrics:
    """The metrics of one job, which is named by its output prefix.

    Totals never go back. A snapshot does when a worker is lost, because rows of its open shards
    will be answered again; nothing is counted until those are made up for.
    """

    def __init__(self, output: str) -> None:
        self._tags = {"output": output}
        self._counted: dict[tuple[str, str], int] = {}
        self._gauges = {
            name: Gauge(f"phi4ray_batch_{name}", described, JOB)
            for name, described in (
                ("rows_planned", "Rows of the job"),
                ("rows_done", "Rows answered, in earlier runs too"),
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
            ("rows_in_flight", snapshot.rows_in_flight),
            ("replicas", snapshot.replicas),
            ("kv_used_fraction", snapshot.kv_used_fraction),
            ("elapsed_seconds", snapshot.elapsed_s),
        ):
            self._gauges[name].set(value, self._tags)
        self._count(self._rows, snapshot.rows_done - snapshot.rows_resumed)
        for code, rows in snapshot.errors.items():
            self._errors.set(rows, {**self._tags, "code": code})
        self._count(self._tokens, snapshot.prompt_tokens, kind="prompt")
        self._count(self._tokens, snapshot.completion_tokens, kind="completion")

    def _count(self, counter: Counter, total: int, **tags: str) -> None:
        key = counter.info["name"], *tags.values()
        before = self._counted.get(key, 0)
        if total > before:
            counter.inc(total - before, {**self._tags, **tags})
            self._counted[key] = total

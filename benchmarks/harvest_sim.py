"""What settings of the harvest are worth, on a simulated replica: what `colocate.py` measures.

    python benchmarks/harvest_sim.py target_tpot_ms=45 target_tpot_ms=50,prefill_tokens=3072

Admission and harvest are those that run in a replica, in virtual time; the engine and the process
in front of it are those of `benchmarks/simulated_replica.py`, with measured speeds of an H200. Load
and figures are those of `colocate.py --shape 512x128 --seconds 96`; of several traces all requests
count together. So settings are told apart in seconds; what they are worth, a GPU tells.
"""

import argparse
import asyncio

from colocate import compared, figures
from colocate_loads import PERIOD_S, Played, bursts, under_way
from simulated_replica import Replica, Request, Speed, VirtualLoop

from jobs.flags import pairs
from phi4ray.serve.admission import Admission, AdmissionConfig
from phi4ray.serve.harvest import Harvest
from phi4ray.serve.slack import HarvestConfig

PROMPT, ANSWER = 512, 128
SECONDS = 2 * PERIOD_S
FILLED_S = 40.0
"""For so long the job has the replica to itself before."""
ROWS = 2000
"""So many of the job wait or run at any time."""
JOB = "batch"


class Trace:
    """One that is played on a replica which, with `batch`, a job has had to itself for a while."""

    def __init__(
        self, config: HarvestConfig, moments: list[float], *, batch: bool, answer_tokens: int
    ) -> None:
        self._loop = asyncio.get_running_loop()
        speed = Speed()
        self._admission = Admission(
            AdmissionConfig(queue_timeout_s=600), capacity_tokens=speed.capacity_tokens,
            max_num_seqs=speed.max_num_seqs, clock=self._loop.time,
        )  # fmt: skip
        self._harvest = Harvest(config, self._admission, clock=self._loop.time)
        self._harvest.join(JOB)
        self._replica = Replica(speed, self._harvest.step)
        self._moments = moments
        self._batch = batch
        self._answer_tokens = answer_tokens
        self._rows = self._finished = 0
        self._timings: list[tuple[float, float]] = []

    async def play(self, capacity: float) -> Played:
        async with under_way(self._work() for _ in range(ROWS if self._batch else 0)):
            await asyncio.sleep(FILLED_S)
            began, aborted = self._loop.time(), self._harvest.aborted
            asked = [asyncio.ensure_future(self._ask(began + moment)) for moment in self._moments]
            await asyncio.sleep(PERIOD_S)
            rows, finished, tokens = self._rows, self._finished, self._replica.online_tokens
            await asyncio.sleep(SECONDS - PERIOD_S)
            rows, finished = self._rows - rows, self._finished - finished
            tokens = self._replica.online_tokens - tokens
            aborted = self._harvest.aborted - aborted
            await asyncio.gather(*asked)
        self._replica.stop()
        return Played(
            seconds=SECONDS - PERIOD_S, asked=sum(moment >= PERIOD_S for moment in self._moments),
            finished=finished, computed=tokens / (PROMPT + ANSWER), batch=rows, aborted=aborted,
            timings=self._timings, capacity=capacity,
        )  # fmt: skip

    async def _work(self) -> None:
        """One row after the other."""
        while True:
            row = Request(PROMPT, self._answer_tokens)
            await self._harvest.run(
                JOB, PROMPT + self._answer_tokens, PROMPT,
                lambda row=row: self._replica.answer(row),
            )  # fmt: skip
            self._rows += 1

    async def _ask(self, at_s: float) -> None:
        await asyncio.sleep(at_s - self._loop.time())
        request = Request(PROMPT, ANSWER, online=True)
        async with self._admission.admit(PROMPT + ANSWER):
            await self._replica.answer(request)
        self._finished += 1
        ended = self._loop.time()
        each_s = (ended - request.first_s) / (ANSWER - 1)
        self._timings.append((request.first_s - at_s, each_s))


def played(
    config: HarvestConfig, moments: list[float], *, batch: bool, capacity: float = 0.0,
    answer_tokens: int = ANSWER,
) -> Played:  # fmt: skip
    """One trace; `answer_tokens` are those of the job's rows."""

    async def play() -> Played:
        trace = Trace(config, moments, batch=batch, answer_tokens=answer_tokens)
        return await trace.play(capacity)

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(play())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=4, help="traces [4]")
    parser.add_argument("settings", nargs="*", default=[""], help="KEY=VALUE,… of harvest")
    arguments = parser.parse_args()
    one = played(HarvestConfig(), [], batch=True)
    capacity = one.batch / one.seconds
    more = bursts(0, capacity, seconds=SECONDS, base=1.1, burst=1.1)
    one = played(HarvestConfig(), more, batch=False)
    saturated = one.computed / one.seconds
    print(f"batch alone: {capacity:.1f} rows/s, online saturated: {saturated:.1f} requests/s")
    traces = [bursts(number, capacity, seconds=SECONDS) for number in range(arguments.seeds)]
    alone = figures([played(HarvestConfig(), trace, batch=False) for trace in traces])
    print("online alone:", shown(alone))
    for text in arguments.settings:
        items = text.split(",") if text else []
        config = HarvestConfig.model_validate(pairs("settings", items))
        both = figures([played(config, t, batch=True, capacity=capacity) for t in traces])
        shares = compared(alone, both, saturated)
        print(f"{text or 'default'}: {shown(both)}\n  {shares}", flush=True)


def shown(row: dict[str, float]) -> str:
    return (
        f"TTFT {row['ttft_p50_ms']:.0f} / {row['ttft_p99_ms']:.0f} ms, "
        f"TPOT {row['tpot_p50_ms']:.1f} / {row['tpot_p99_ms']:.1f} ms, "
        f"{row['made_way']:.0f} rows made way"
    )


if __name__ == "__main__":
    main()

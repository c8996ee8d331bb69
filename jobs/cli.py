"""The command `phi4ray`, whole: `phi4ray.cli`, and batch jobs on a running cluster.

Exit codes of jobs: 0 all rows answered, 3 finished with error rows, 1 failed or not finished, 2
bad arguments; 130 when Ctrl-C ended the watching, and not the job.
"""

import json
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.show import (
    again,
    figures_table,
    how_to_go_on,
    job_facts,
    job_lines,
    job_list,
    row_line,
    status_words,
)
from jobs.upload import uploaded
from phi4ray.batch.executor import threaded
from phi4ray.batch.progress import last_progress_line
from phi4ray.batch.progress_file import RunProgress
from phi4ray.batch.results import Results, read_results, rows_of
from phi4ray.batch.submission import (
    FINISHED_WITH_ERROR_ROWS,
    Submission,
    submission_id,
)
from phi4ray.cli import AsJson, app, exit_codes, new_console
from phi4ray.errors import ClusterError, ConfigError, Phi4rayError
from phi4ray.fit import refuse_misfit
from phi4ray.storage import normal

if TYPE_CHECKING:  # Ray takes seconds to import: only commands that need it do
    from cluster.jobs import Jobs

DETACHED = 130

Address = Annotated[
    str | None,
    typer.Option(
        help="the cluster's dashboard, as http://HEAD:8265; default: RAY_API_SERVER_ADDRESS, "
        "RAY_ADDRESS, or the cluster of this machine"
    ),
]
JobId = Annotated[str, typer.Argument(metavar="ID", help="as `phi4ray status` lists it")]


def main() -> None:
    """Run the command line."""
    app()


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="`phi4ray submit -- --help` lists the flags of the job.",
)
def submit(
    context: typer.Context,
    address: Address = None,
    wait: Annotated[bool, typer.Option(help="follow the job until it ends")] = True,
    working_dir: Annotated[
        Path | None,
        typer.Option(
            file_okay=False,
            exists=True,
            help="folder to upload and run in; default: this one if it is phi4ray's source, else "
            "none, and the cluster's installed phi4ray runs",
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="the job's id; default: one is made")] = None,
) -> None:
    """Start a batch job with --input, --output, --recipe and any other flag it has, and follow it.

    Ctrl-C stops the watching, and not the job.
    """
    from jobs.batch_infer import configuration, parser
    from jobs.flags import to_arguments

    with exit_codes():
        arguments = parser().parse_args(context.args)
        config = configuration(arguments)  # what is wrong is said before anything starts
        if arguments.gpu and not arguments.serve:
            refuse_misfit(config.engine, [arguments.gpu])
        # The job runs in another folder.
        arguments.input = [normal(uri) for uri in config.input]
        arguments.output = config.output
        if Path(config.engine.model).is_dir() and not arguments.serve:
            arguments.model = config.engine.model
        with uploaded(working_dir, arguments.config) as (folder, file):
            arguments.config = file
            jobs = _jobs(address)
            job = jobs.submit(
                name or submission_id(config.output, datetime.now(UTC), secrets.token_hex(2)),
                to_arguments(arguments),
                arguments.output,
                folder,
            )
        if not wait:
            typer.echo(job.id)
            typer.echo(how_to_go_on(job), err=True)
            return
        typer.echo(f"submitted {job.id}")
        _follow(jobs, job)


@app.command()
def status(
    job_id: Annotated[str | None, typer.Argument(metavar="[ID]", help="default: all jobs")] = None,
    address: Address = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="until it ends")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the batch jobs of a cluster, or one of them: rows, rows/s, ETA, errors, replicas."""
    with exit_codes():
        if job_id is None:
            if follow:
                raise ConfigError("--follow takes the id of one job")
            _list(_jobs(address), as_json)
            return
        jobs = _jobs(address)
        job = jobs.get(job_id)
        if follow:
            _follow(jobs, job)
        found, trouble = _progress(job)
        log_line = None
        if found is None and job.status == "RUNNING":
            log_line = last_progress_line(jobs.log(job.id))
        if as_json:
            typer.echo(json.dumps(job_facts(job, found, log_line), indent=2))
            return
        for name, value in job_lines(job, found, time.time(), log_line):
            typer.echo(f"{name:<10} {value}")
        if trouble is not None:
            typer.echo(f"no progress from its output: {trouble}", err=True)
        if job.status == "FAILED" and job.exit_code != FINISHED_WITH_ERROR_ROWS:
            typer.echo(f"why: phi4ray logs {job.id}", err=True)


@app.command()
def cancel(job_id: JobId, address: Address = None) -> None:
    """Stop a job. Its finished parts stay, and the same command goes on from them."""
    with exit_codes():
        jobs = _jobs(address)
        job = jobs.get(job_id)
        if job.ended:
            raise ClusterError(f"{job.id} has ended ({job.outcome}): there is nothing to cancel")
        job = jobs.stop(job.id)
        typer.echo(f"{job.id} {job.outcome}")
        if job.status != "STOPPED":
            return
        typer.echo(_what_stays(job))
        typer.echo(f"go on: {again(job)}")


@app.command()
def logs(
    job_id: JobId,
    address: Address = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="until it ends")] = False,
) -> None:
    """Print what a job has printed."""
    with exit_codes():
        jobs = _jobs(address)
        job = jobs.get(job_id)
        if not follow:
            typer.echo(jobs.log(job.id), nl=False)
            return
        with _detachable(job):
            for line in jobs.log_lines(job.id):
                if line is not None:
                    typer.echo(line)


@app.command()
def results(
    job: Annotated[str, typer.Argument(metavar="ID|OUTPUT", help="a job's id, or its --output")],
    address: Address = None,
    head: Annotated[int, typer.Option(min=0, help="rows to show")] = 5,
    errors: Annotated[bool, typer.Option("--errors", help="show rows without an answer")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what a job wrote: figures, places and first rows. With OUTPUT, no cluster is needed."""
    with exit_codes():
        found = _results(normal(job) if _is_output(job) else _output_of(job, address))
        rows = list(islice(rows_of(found, errors_only=errors), head))
        if as_json:
            typer.echo(json.dumps({**found.figures(), "rows_shown": rows}, indent=2))
        else:
            figures, console = found.figures(), new_console()
            console.print(figures_table(found.plan.plan_id, figures))
            for row in rows:
                console.print(row_line(row), soft_wrap=True)
            for name in ("output", "report", "manifest"):
                if figures[name] is not None:
                    console.print(f"{name + ':':<9} {figures[name]}", soft_wrap=True)
        if not found.finished:
            raise ClusterError(
                f"the job is not finished: {len(found.error_rows):,} of "
                f"{len(found.plan.shards):,} parts are written. The same command goes on from them"
            )
        if found.errors:
            raise typer.Exit(FINISHED_WITH_ERROR_ROWS)


def _jobs(address: str | None) -> "Jobs":
    from cluster.jobs import Jobs

    return Jobs(address)


@contextmanager
def _detachable(job: Submission) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"\ndetached: {job.id} runs on", err=True)
        typer.echo(how_to_go_on(job), err=True)
        raise typer.Exit(DETACHED) from None


def _follow(jobs: "Jobs", job: Submission) -> None:
    from jobs.follow import follow

    with _detachable(job):
        job = follow(jobs, job, new_console())
    typer.echo(f"{job.id} {status_words(job)}", err=True)
    if job.exit_code is None and job.status == "FAILED":
        typer.echo(job.message, err=True)  # it did not come to a log
    raise typer.Exit(job.process_exit_code)


def _progress(job: Submission) -> tuple[RunProgress | None, Phi4rayError | None]:
    """What a job told last, or why it cannot be read here."""
    from jobs.follow import Watch

    try:
        return Watch(job).look(), None
    except Phi4rayError as error:
        return None, error


def _list(jobs: "Jobs", as_json: bool) -> None:
    listed = jobs.all()
    told = threaded(lambda job: None if job.ended else _progress(job)[0], listed)
    found = list(zip(listed, told, strict=True))
    if as_json:
        typer.echo(json.dumps([job_facts(job, progress) for job, progress in found], indent=2))
        return
    for line in job_list(found, time.time()):
        typer.echo(line)


def _results(output: str) -> Results:
    from jobs.follow import check_answers

    check_answers(output)
    return read_results(output)


def _what_stays(job: Submission) -> str:
    try:
        found = _results(job.output) if job.output is not None else None
    except Phi4rayError as error:
        return f"finished parts stay in {job.output} (they cannot be counted here: {error})"
    if found is None:
        return "finished parts stay in its output"
    return (
        f"finished parts stay: {len(found.error_rows):,} of {len(found.plan.shards):,}, with "
        f"{found.rows:,} of {found.plan.rows:,} rows, in {found.output}"
    )


def _is_output(text: str) -> bool:
    return "/" in text or Path(text).is_dir()


def _output_of(job_id: str, address: str | None) -> str:
    job = _jobs(address).get(job_id)
    if job.output is None:
        raise ConfigError(f"the output of {job_id} is not known: give its --output")
    return job.output


if __name__ == "__main__":
    main()

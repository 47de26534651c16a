"""`edgellm batch`: a file of prompts, answered several at a time, that can be interrupted and gone on with."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgellm.cli import options
from edgellm.cli.console import INTERRUPTED, clear_status, on_thread, say, status
from edgellm.config import DEFAULT_N_CTX
from edgellm.errors import Cancelled

if TYPE_CHECKING:
    from edgellm.config import LoadParams
    from edgellm.engine.jobs import Job, Results

_N_CTX = 64  # of the model's own context, which nothing is evaluated in


def batch(
    model: Annotated[str, typer.Argument(help="Path of a GGUF, or a name from `edgellm models`.")],
    prompts: Annotated[Path, typer.Argument(metavar="IN.jsonl", help="A line each: custom_id and prompt or messages.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="OUT.jsonl", help="Answers are appended here.")],
    parallel: Annotated[int, typer.Option(min=1, max=64, help="How many are answered at a time.")] = 8,
    max_tokens: options.Tokens = None,
    system: options.System = None,
    seed: options.Seed = None,
    temperature: options.Temperature = None,
    n_ctx: Annotated[int, typer.Option(help="Tokens of context for each of them.")] = DEFAULT_N_CTX,
    threads: options.Threads = 0,
    lora: options.LoraFiles = None,
) -> None:
    """Answer every line of a JSONL file. What OUT.jsonl holds already isn't done again: run it again after a break."""
    from edgellm.engine.jobs import Results, read_jobs

    given: dict[str, Any] = {"max_tokens": max_tokens, "seed": seed, "temperature": temperature}
    options.check_sampling(given)
    params = options.load_params(_N_CTX, threads)
    jobs = read_jobs(prompts)
    with closing(Results(output)) as results:
        todo = [job for job in jobs if job.custom_id not in results.done]
        if len(todo) < len(jobs):
            say(f"{len(jobs) - len(todo)} of {len(jobs)} lines are answered already")
        if todo:
            _answer(model, params, given, system, lora, parallel, n_ctx, todo, results)
    say(f"{results.n_written} answers, {results.n_errors} of them errors, in {output}")
    if results.n_errors:
        raise typer.Exit(1)


def _answer(
    name: str,
    params: LoadParams,
    given: dict[str, Any],
    system: str | None,
    lora: list[str] | None,
    parallel: int,
    n_ctx: int,
    todo: list[Job],
    results: Results,
) -> None:
    from edgellm.config import SamplingParams
    from edgellm.engine.jobs import answers

    with options.open_model(name, params, lora) as model:
        sampling = options.sampling_params(model.path, SamplingParams(), given)
        started, n_tokens = monotonic(), 0
        stream: Iterator[tuple[Job, dict[str, object], int]] = answers(model, todo, sampling, system, parallel, n_ctx)
        try:
            with closing(on_thread(stream, model.cancel)) as found:
                for n, (job, record, n_new) in enumerate(found, start=1):
                    results.write(job, record)
                    n_tokens += n_new
                    _show(n, len(todo), n_tokens, monotonic() - started)
        except Cancelled:
            clear_status()
            say(f"stopped; run it again to go on ({results.n_written} answers are in the file)")
            raise typer.Exit(INTERRUPTED) from None
    clear_status()


def _show(n: int, n_all: int, n_tokens: int, seconds: float) -> None:
    if sys.stderr.isatty():
        left = seconds / n * (n_all - n)
        status(f"{n} of {n_all} · {n_tokens / seconds:.0f} tok/s · {int(left) // 60}:{int(left) % 60:02} left")

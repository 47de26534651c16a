"""How fast a model reads, writes and loads here, what memory it takes, and what guessing brings: `edgellm bench`.

Times are those of somebody who uses the API: from the call to the first piece of text, and between pieces. With a peer
(`llama_cpp.Llama`) both take turns in every round, with the same tokens and threads, greedily, without guesses.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Protocol

from edgellm.config import LoadParams, SamplingParams
from edgellm.engine.model import Model, load
from edgellm.errors import GenerationError
from edgellm.measure.footprint import footprint
from edgellm.native.peer import Peer
from edgellm.native.undisturbed import by_turns

OURS, THEIRS = "edgellm", "llama-cpp-python"
ROUNDS = 5
PROMPTS = (64, 512)  # tokens
DEPTHS = (16, 512, 2000)  # tokens before what is written
N_WRITTEN = 32  # tokens of a round
_N_COPIED, _N_CTX_COPY = 96, 512  # tokens written, and in all
_TEXT = (
    "Every morning the baker opens the shop at six, sweeps the floor, lights the oven and puts the prices on a board. "
    "Bread costs two coins, a cake costs five, and what is left in the evening goes to the school across the street. "
)
_RECORDS = "".join(
    f'{{"id": {i}, "name": "sensor-{chr(97 + i)}", "place": "hall {i % 3 + 1}", "limit": {20 + 3 * i}}}\n'
    for i in range(12)
)
_COPY = f"The file sensors.jsonl:\n{_RECORDS}\nThe same file once more:\n"  # what guessing is good at

Progress = Callable[[str, float], object]  # what is being measured, and the fraction done


@dataclass(frozen=True)
class Spread:
    """Of all rounds."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Figure:
    """One thing that was timed. kind: load, first_token (seconds), prompt, decode (tokens per second); n: tokens read
    before. values: of each contestant. ratio: ours over theirs, the median of all rounds; None without a peer.
    """

    kind: str
    n: int
    values: Mapping[str, Spread]
    ratio: float | None


class Contestant(Protocol):
    def stream(self, tokens: Sequence[int], n_tokens: int) -> Iterator[int]:
        """Write greedily after a prompt: how many tokens each piece has, as it comes."""
        ...

    def close(self) -> None: ...


class _Ours:
    def __init__(self, path: Path, params: LoadParams) -> None:
        self.model = load(path, params)

    def stream(self, tokens: Sequence[int], n_tokens: int) -> Iterator[int]:
        with self.model.generate(tokens, SamplingParams(max_tokens=n_tokens), draft="off") as responses:
            for response in responses:
                yield len(response.token_ids)

    def close(self) -> None:
        self.model.close()


def bench(
    path: Path,
    params: LoadParams | None = None,
    *,
    rounds: int = ROUNDS,
    compare: bool = False,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """All figures as plain data: model, settings, figures (see `Figure`), memory, speculation.

    params: n_ctx is made as large as needed. rounds: at least 1; one more to warm up isn't counted.
    compare: also time `llama_cpp.Llama`. Errors: those of `load`; GenerationError for a model that writes no text.
    """
    progress = on_progress or (lambda label, fraction: None)
    params = replace(params or LoadParams(), n_ctx=max(*DEPTHS, _N_CTX_COPY) + N_WRITTEN + 8)
    progress("loading", 0.0)
    with ExitStack() as stack:
        ours = stack.enter_context(closing(_Ours(path, params)))
        settings = ours.model.settings
        openers: dict[str, Callable[[], Contestant]] = {OURS: partial(_Ours, path, params)}
        contestants: dict[str, Contestant] = {OURS: ours}
        if compare:
            shared = {key: settings[key] for key in ("n_ctx", "n_threads", "n_batch")}
            openers[THEIRS] = partial(Peer, path, **shared)
            contestants[THEIRS] = stack.enter_context(closing(openers[THEIRS]()))
        text = _tokens(ours.model)
        figures = list(_figures(contestants, text, settings["n_ctx"], rounds, progress))
        progress("what guessing brings", 0.75)
        speculation = _speculation(ours.model, rounds)
    progress("loading", 0.85)
    figures.insert(0, _load_time(openers, rounds))
    progress("memory", 0.95)
    memory = {name: footprint(path, params, peer=name == THEIRS) for name in contestants}
    return {
        "model": str(path),
        "n_bytes": path.stat().st_size,
        "settings": dict(settings),
        "rounds": rounds,
        "figures": [asdict(figure) for figure in figures],
        "memory": memory,
        "speculation": speculation,
    }


def _tokens(model: Model) -> list[int]:
    unit = model.tokenize(_TEXT)
    return unit * (2 + max(*DEPTHS, *PROMPTS) // len(unit))


def _figures(
    contestants: Mapping[str, Contestant], text: list[int], n_ctx: int, rounds: int, progress: Progress
) -> Iterator[Figure]:
    """Prompts begin elsewhere in the text each round, or nothing would be read; what is written after a depth begins
    at the same place, so that it is read only once.
    """
    steps = [("prompt", n) for n in PROMPTS] + [("decode", n) for n in DEPTHS]
    steps = [(kind, n) for kind, n in steps if n + N_WRITTEN < n_ctx]
    for done, (kind, n) in enumerate(steps):
        progress("reading" if kind == "prompt" else f"writing after {n} tokens", 0.05 + 0.7 * done / len(steps))
        times: dict[str, list[float]] = {name: [] for name in contestants}
        for i in range(rounds + 1):
            for name, contestant in by_turns([*contestants.items()], i):
                prompt = text[i : i + n] if kind == "prompt" else text[:n]
                first, later = _timed(contestant, prompt, 1 if kind == "prompt" else N_WRITTEN)
                if i:
                    times[name].append(first if kind == "prompt" else later)
        if kind == "prompt":
            yield _figure("first_token", n, times)
        yield _figure(
            kind, n, {name: [(n if kind == "prompt" else 1) / t for t in found] for name, found in times.items()}
        )


def _timed(contestant: Contestant, prompt: Sequence[int], n_tokens: int) -> tuple[float, float]:
    """Seconds to the first piece, and of each token after it (0 where only one was asked for)."""
    started = time.perf_counter()
    times, counts = [], []
    for n in contestant.stream(prompt, n_tokens):
        times.append(time.perf_counter())
        counts.append(n)
    while counts and not counts[-1]:  # the end of a stream may bring no token
        counts.pop()
        times.pop()
    if not counts or (n_tokens > 1 and len(counts) < 2):
        raise GenerationError("the model ends its answer at once: there is nothing to time; give a text model")
    later = (times[-1] - times[0]) / sum(counts[1:]) if n_tokens > 1 else 0.0
    return times[0] - started, later


def _figure(kind: str, n: int, values: Mapping[str, Sequence[float]]) -> Figure:
    ratio = None
    if THEIRS in values:
        ratio = median(ours / theirs for ours, theirs in zip(values[OURS], values[THEIRS], strict=True))
    return Figure(kind, n, {name: _spread(found) for name, found in values.items()}, ratio)


def _spread(values: Sequence[float]) -> Spread:
    return Spread(median(values), min(values), max(values))


def _load_time(openers: Mapping[str, Callable[[], Contestant]], rounds: int) -> Figure:
    """Of a file that the system has in memory."""
    times: dict[str, list[float]] = {name: [] for name in openers}
    for i in range(rounds):
        for name, open_one in by_turns([*openers.items()], i):
            started = time.perf_counter()
            open_one().close()
            times[name].append(time.perf_counter() - started)
    return _figure("load", 0, times)


def _speculation(model: Model, rounds: int) -> dict[str, Any] | None:
    """Writing what mostly stands in the prompt, with and without guesses, in tokens per second. None: a context too
    short for that.
    """
    if len(model.tokenize(_COPY)) + 1 + _N_COPIED > model.n_ctx:
        return None
    speeds: dict[str, list[float]] = {"off": [], "auto": []}
    drafted = accepted = 0
    for i in range(rounds + 1):
        for draft, found in by_turns([*speeds.items()], i):
            stats = model.complete(_COPY, SamplingParams(max_tokens=_N_COPIED), draft=draft).stats
            if i:
                found.append(stats.decode_tokens_per_second)
                drafted, accepted = drafted + stats.drafted, accepted + stats.accepted
    ratio = median(auto / off for auto, off in zip(speeds["auto"], speeds["off"], strict=True) if off)
    return {
        **{draft: asdict(_spread(found)) for draft, found in speeds.items()},
        "ratio": ratio,
        "accepted": accepted / drafted if drafted else None,
    }

"""Which settings run a model fastest on this machine: what `edgellm tune` measures, within a time limit.

One thing after the other, the most important first: threads, mapped or copied weights, kinds of KV cache with and
without flash attention deep in a context, what checking guesses costs, and the size of a prompt's batches. Settings are
compared by turns (`undisturbed.interleaved`). Whatever there is no time or memory for keeps its default and is named.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import numpy as np

from edgellm.config import DEFAULT_LOAD_MODE, DEFAULT_N_BATCH, LoadMode, LoadParams, physical_cpu_count
from edgellm.engine.machine import busy_cores
from edgellm.engine.memory import available_memory, memory_need
from edgellm.engine.tuned import Attention, Tuning
from edgellm.errors import GenerationError
from edgellm.gguf_header import GGUFHeader, check_loadable
from edgellm.measure.choice import (
    DEFAULT_ATTENTION,
    FULL_DEPTHS,
    N_READ,
    N_STEPS,
    AttentionPlan,
    Timed,
    best,
    choose_batch,
    choose_load_mode,
    finalists,
    plan_attention,
    rank_attention,
    thread_counts,
    verify_curve,
)
from edgellm.native.context import Context
from edgellm.native.model import NativeModel
from edgellm.native.stretch import stretch
from edgellm.native.undisturbed import interleaved

BUDGET_S = 60.0
VERIFIED = (1, 2, 3, 4, 6, 8, 12, 16, 25)  # tokens evaluated together; 25 = a guess of MAX_DRAFT, and the token before
_MIDDLE = 700  # tokens of context at which their cost is measured
_BATCHES = (128, 256, 512)
_ROOM = 512  # tokens beyond: what is decoded at all depths by models that can't take tokens back

_READ = 64  # tokens of the prompts that threads and load modes are compared with
_READ_LONG = 512  # and batches
_STAGE_S = 3.0  # patience of one comparison
_DISTURBED = 1.5  # times as long as expected, on a machine that has other work too
_TEXT = (
    "The lighthouse stood at the end of a long pier, and every evening the keeper walked out with a lamp and a book. "
    "Ships passed far away; their captains counted the seconds between two flashes and wrote them down. In winter the "
    "waves were higher than the rail, so he tied himself to it with a rope. What is 17 + 25? It is 42. def area(r): "
    "return 3.14159 * r ** 2. Nobody knew how old the stairs were, but there were exactly two hundred and six of them. "
)

Key = TypeVar("Key")
Progress = Callable[[str, float], object]  # what is being measured, and the fraction done


def tune(path: Path, *, seconds: float = BUDGET_S, on_progress: Progress | None = None) -> Tuning:
    """Measure, and choose; nothing is stored. It takes about as long as `seconds` at most, loading included.

    Errors: ModelFileError, GenerationError (an embedding model, no memory). Any exception of on_progress ends it.
    """
    header = check_loadable(path)
    with ExitStack() as stack:
        run = _Run(header, stack, time.perf_counter() + seconds, on_progress or (lambda label, fraction: None))
        for label, measure, done in (
            ("loading", run.load, 0.0),
            ("threads", run.measure_threads, 0.1),
            ("mapped and copied weights", run.measure_load_modes, 0.15),
            ("KV cache and flash attention", run.measure_attention, 0.25),
            ("against the defaults", run.measure_gain, 0.75),
            ("checking guesses", run.measure_verify_cost, 0.85),
            ("batches of a prompt", run.measure_batches, 0.9),
        ):
            run.progress(label, done)
            measure()
        run.progress("done", 1.0)
        return run.tuning()


class _Contestant:
    """A context with a number of threads, somewhere in a text."""

    def __init__(self, context: Context, text: Sequence[int], n_threads: int) -> None:
        self.context, self._text, self.n_threads = context, text, n_threads
        self._chunks: list[float] = []

    @property
    def prompt_seconds_per_token(self) -> float:
        """Of what `fill` read, the median of its chunks."""
        return median(self._chunks)

    def read(self, n_tokens: int) -> float:
        """Seconds for each token of a prompt, from an empty context."""
        self.context.set_threads(self.n_threads)
        self.context.reuse_prefix(())
        started = time.perf_counter()
        self.context.decode(self._text[:n_tokens])
        return (time.perf_counter() - started) / n_tokens

    def fill(self, depth: int, deadline: float) -> bool:
        """Come to a depth (at least one token) by reading at least the end of it; before that, where the model allows
        it, a short text is repeated. False: given up where it was before, because it would have taken too long.
        """
        self.context.set_threads(self.n_threads)
        before = len(self.context.tokens)
        if depth > 2 * N_READ and self._read_on(N_READ, deadline):
            stretch(self.context, depth - N_READ)
        if self._read_on(max(1, depth), deadline):
            return True
        self._back_to(max(0, before - 1))
        self.context.decode(self._text[:1])  # there are no logits after a stretch
        return False

    def _read_on(self, depth: int, deadline: float) -> bool:
        context = self.context
        while missing := self._text[len(context.tokens) : min(depth, len(context.tokens) + N_READ)]:
            started = time.perf_counter()
            if started > deadline:
                return False
            context.decode(missing)
            self._chunks.append((time.perf_counter() - started) / len(missing))
        return True

    def step(self) -> float:
        """Seconds of a decode and choosing the next token, after one that isn't timed: it wakes the threads."""
        context, depth = self.context, len(self.context.tokens)
        context.set_threads(self.n_threads)
        context.step(context.likeliest(np))
        started = time.perf_counter()
        context.step(context.likeliest(np))
        context.step(context.likeliest(np))
        seconds = (time.perf_counter() - started) / 2
        self._back_to(depth)
        return seconds

    def verify(self, n_tokens: int) -> float:
        """Seconds of evaluating so many tokens together."""
        context, depth = self.context, len(self.context.tokens)
        context.step(context.likeliest(np))
        started = time.perf_counter()
        if n_tokens == 1:
            context.step(self._text[0])
        else:
            context.verify(self._text[:n_tokens])
        for i in range(n_tokens):
            context.likeliest(np, i)
        seconds = time.perf_counter() - started
        self._back_to(depth)
        return seconds

    def _back_to(self, depth: int) -> None:
        if not self.context.model.is_recurrent:
            self.context.keep(depth)


class _Run:
    """The state of one `tune`: what is loaded, what was chosen so far, figures for people."""

    def __init__(self, header: GGUFHeader, stack: ExitStack, deadline: float, progress: Progress) -> None:
        self.header, self.progress = header, progress
        self._stack, self._deadline = stack, deadline
        self._started = time.perf_counter()
        self._busy_before = busy_cores()
        self._models: dict[LoadMode, NativeModel] = {}
        self._kinds: dict[Attention, _Contestant] = {}
        self._speed = Timed(0.0, 0.0)
        self._depth = 0  # the deepest that was measured
        self._deepest: dict[Attention, float] = {}  # seconds of a decode there
        self.n_threads, self.n_batch = physical_cpu_count(), DEFAULT_N_BATCH
        self.load_mode: LoadMode = DEFAULT_LOAD_MODE
        self.attention: tuple[Attention, ...] = ()
        self.verify_cost: dict[int, float] = {}
        self.measured: dict[str, Any] = {}
        self.dropped: list[str] = []

    @property
    def seconds_left(self) -> float:
        return self._deadline - time.perf_counter()

    def load(self) -> None:
        """The model as it is loaded by default, or mapped where there is no memory for that; a first look at speed."""
        if not self._fits("repack"):
            self.load_mode = "mmap"
        model = self._model(self.load_mode)
        if model.is_embedder:
            raise GenerationError(f"{self.header.path.name} is an embedding model; there is nothing to tune")
        unit = model.vocab.tokenize(_TEXT, special=False)
        longest = max(_READ_LONG, 2000) + _ROOM
        self._text = (unit * (longest // len(unit) + 1))[:longest]
        self._n_ctx_max = model.n_ctx_train or longest
        self._first = self._contestant(model, LoadParams(n_ctx=_READ + _ROOM), self.n_threads)
        self._first.read(8)
        reads, steps = [self._first.read(_READ) for _ in range(2)], [self._first.step() for _ in range(3)]
        self._speed = Timed(min(reads), min(steps))
        self._stretches = stretch(self._first.context, 2 * _READ)
        self._first.read(_READ)

    def measure_threads(self) -> None:
        counts = thread_counts(physical_cpu_count())
        candidates = {n: _Contestant(self._first.context, self._text, n) for n in counts}
        if len(candidates) > 1 and self._has_time_for("numbers of threads", len(candidates)):
            timed = self._race(candidates)
            self.n_threads = best(timed)
            self._speed = timed[self.n_threads]
            self.measured["threads"] = [{"n_threads": n, **_speeds(found)} for n, found in timed.items()]
        self._first.n_threads = self.n_threads

    def measure_load_modes(self) -> None:
        if self.load_mode == "mmap" or not self._copied_bytes():
            return  # nothing would be copied anyway
        if not self._fits("repack", copies=2):
            self.dropped.append("mapped beside copied weights (there isn't memory for both)")
        elif self._has_time_for("mapped and copied weights", 3):
            params = LoadParams(n_ctx=_READ + _ROOM)
            modes: dict[LoadMode, _Contestant] = {
                self.load_mode: self._first,
                "mmap": self._contestant(self._model("mmap"), params, self.n_threads),
            }
            timed = self._race(modes)
            self.load_mode = choose_load_mode(timed)
            self.measured["load_mode"] = [{"load_mode": mode, **_speeds(found)} for mode, found in timed.items()]
            self._first, self._speed = modes[self.load_mode], timed[self.load_mode]

    def measure_attention(self) -> None:
        reserve = 60 * self._speed.decode + _STAGE_S  # for what comes after
        seconds = self.seconds_left - reserve
        plan = plan_attention(self._speed, seconds, self._n_ctx_max, self._n_kinds_in_memory(), self._stretches)
        self.dropped += plan.dropped
        self._open_kinds(plan)
        decode: dict[Attention, dict[int, float]] = {kind: {} for kind in self._kinds}
        for i, depth in enumerate(plan.depths if self._kinds else ()):
            self.progress(f"KV cache and flash attention after {depth} tokens", 0.25 + 0.5 * i / len(plan.depths))
            rivals = list(self._kinds) if i < FULL_DEPTHS else finalists(decode, depth)
            if not all(self._kinds[kind].fill(depth, self._deadline - reserve) for kind in rivals):
                self.dropped.append(f"a context of {depth} tokens (the machine turned out to be slower)")
                break
            steps = {kind: self._kinds[kind].step for kind in rivals}
            for kind, seconds in interleaved(steps, self._patience(), N_STEPS // 3).items():
                decode[kind][depth] = seconds
            self._depth = depth
        if not self._depth and any(not found for found in decode.values()):
            return
        timed = {
            kind: (max(found), Timed(self._kinds[kind].prompt_seconds_per_token, found[max(found)]))
            for kind, found in decode.items()
        }
        self.attention = rank_attention(timed)
        self._deepest = {kind: found.decode for kind, (depth, found) in timed.items() if depth == self._depth}
        self.measured["attention"] = [
            {**asdict(kind), "prompt": 1 / found.prompt, "decode": {d: 1 / t for d, t in decode[kind].items()}}
            for kind, (_, found) in timed.items()
        ]

    def measure_gain(self) -> None:
        """The choice against the defaults, deep in a context. What turns out slower isn't chosen."""
        if not self.attention:
            return
        default = (DEFAULT_ATTENTION, physical_cpu_count(), DEFAULT_LOAD_MODE)
        tuned = self._kinds[self.attention[0]]
        gain: dict[str, Any] = {"depth": self._depth}
        if (self.attention[0], self.n_threads, self.load_mode) == default:
            gain["ratio"] = 1.0
        elif usual := self._default_contestant():
            found = interleaved({"default": usual.step, "tuned": tuned.step}, self._patience())
            if (self.n_threads, self.load_mode) == default[1:]:
                # so both were timed before, by turns too; what disturbs only ever makes times longer
                found["default"] = min(found["default"], self._deepest[DEFAULT_ATTENTION])
                found["tuned"] = min(found["tuned"], self._deepest[self.attention[0]])
            gain |= {name: 1 / seconds for name, seconds in found.items()}
            gain["ratio"] = found["default"] / found["tuned"]
            if gain["ratio"] < 1:
                gain |= {"ratio": 1.0, "tuned": gain["default"]}
                self.n_threads, self.load_mode = default[1:]
                others = (kind for kind in self.attention if kind != DEFAULT_ATTENTION)
                self.attention = (DEFAULT_ATTENTION, *others)
        else:
            return
        self.measured["gain"] = gain

    def measure_verify_cost(self) -> None:
        chosen = self._kinds.get(self.attention[0]) if self.attention else self._first
        if chosen is None or chosen.context.model.is_recurrent:
            return
        if self.seconds_left < 100 * self._speed.decode:
            self.dropped.append("the cost of checking guesses")
            return
        chosen.context.set_threads(self.n_threads)
        chosen.context.keep(min(_MIDDLE, len(chosen.context.tokens)))
        self.measured["verify_depth"] = len(chosen.context.tokens)
        chosen.context.step(self._text[0])
        measures = {n: partial(chosen.verify, n) for n in VERIFIED if n <= chosen.context.n_outputs}
        self.verify_cost = verify_curve(interleaved(measures, self._patience(), 8))

    def measure_batches(self) -> None:
        n_tokens = min(_READ_LONG, self._n_ctx_max)
        if self.seconds_left < _DISTURBED * 3 * len(_BATCHES) * n_tokens * self._speed.prompt:
            self.dropped.append("sizes of a prompt's batches")
            return
        kind = self.attention[0] if self.attention else DEFAULT_ATTENTION
        params = LoadParams(n_ctx=n_tokens, kv_type=kind.kv_type, flash_attn=kind.flash_attn)
        model = self._model(self.load_mode)
        contestants = {
            n: self._contestant(model, replace(params, n_batch=n), self.n_threads) for n in _BATCHES if n <= n_tokens
        }
        reads = {n: partial(one.read, n_tokens) for n, one in contestants.items()}
        found = interleaved(reads, self._patience(), 3)
        self.n_batch = choose_batch(found)
        self.measured["batch"] = [{"n_batch": n, "prompt": 1 / seconds} for n, seconds in found.items()]

    def tuning(self) -> Tuning:
        seconds = time.perf_counter() - self._started
        self.measured |= {"seconds": seconds, "dropped": self.dropped, "busy_cores_before": self._busy_before}
        return Tuning(
            self.n_threads, self.n_batch, self.load_mode, self.attention, dict(self.verify_cost), self.measured
        )

    def _model(self, load_mode: LoadMode) -> NativeModel:
        if load_mode not in self._models:
            model = NativeModel(self.header.path, load_mode=load_mode)
            self._models[load_mode] = self._stack.enter_context(closing(model))
        return self._models[load_mode]

    def _contestant(self, model: NativeModel, params: LoadParams, n_threads: int) -> _Contestant:
        context = self._stack.enter_context(closing(Context(model, params, n_outputs=max(VERIFIED))))
        return _Contestant(context, self._text, n_threads)

    def _open_kinds(self, plan: AttentionPlan) -> None:
        for kind in plan.kinds:
            params = LoadParams(n_ctx=max(plan.depths) + _ROOM, kv_type=kind.kv_type, flash_attn=kind.flash_attn)
            try:
                self._kinds[kind] = self._contestant(self._model(self.load_mode), params, self.n_threads)
            except GenerationError as exc:  # not every backend has every kind
                self.dropped.append(str(exc))
        if any(kind.kv_type != "q8_0" for kind in self._kinds):
            return
        self._kinds.clear()

    def _default_contestant(self) -> _Contestant | None:
        """What a load without tuning gives; None where there is no time to fill its context."""
        if self.load_mode == DEFAULT_LOAD_MODE and (same := self._kinds.get(DEFAULT_ATTENTION)):
            return _Contestant(same.context, self._text, physical_cpu_count())
        if DEFAULT_LOAD_MODE not in self._models or self.seconds_left < _DISTURBED * self._depth * self._speed.prompt:
            return None
        params = LoadParams(n_ctx=self._depth + _ROOM)
        usual = self._contestant(self._model(DEFAULT_LOAD_MODE), params, physical_cpu_count())
        return usual if usual.fill(self._depth, self._deadline) else None

    def _race(self, candidates: Mapping[Key, _Contestant]) -> dict[Key, Timed]:
        prompt = interleaved({key: partial(one.read, _READ) for key, one in candidates.items()}, self._patience(), 3)
        decode = interleaved({key: one.step for key, one in candidates.items()}, self._patience())
        return {key: Timed(prompt[key], decode[key]) for key in candidates}

    def _patience(self) -> float:
        """Seconds that a comparison may take: a busy machine must not use up all of the time for the first ones."""
        return max(0.0, min(_STAGE_S, self.seconds_left / 4))

    def _has_time_for(self, what: str, n_candidates: int) -> bool:
        """Whether a `_race` of so many can be afforded; half of the time is for what comes after."""
        one = 2 * _READ * self._speed.prompt + N_STEPS * self._speed.decode
        if _DISTURBED * n_candidates * one <= self.seconds_left / 2:
            return True
        self.dropped.append(what)
        return False

    def _fits(self, load_mode: LoadMode, copies: int = 1) -> bool:
        need = memory_need(self.header, LoadParams(n_ctx=_READ + _ROOM, load_mode=load_mode))
        return need.resident + (copies - 1) * (need.copied + need.mapped) <= available_memory().available

    def _copied_bytes(self) -> int:
        return memory_need(self.header, LoadParams(load_mode="repack")).copied

    def _n_kinds_in_memory(self) -> int:
        need = memory_need(self.header, LoadParams(n_ctx=2000 + _ROOM, load_mode=self.load_mode))
        return available_memory().available // (2 * max(1, need.kv + need.compute))


def _speeds(timed: Timed) -> dict[str, float]:
    return {"prompt": 1 / timed.prompt, "decode": 1 / timed.decode}

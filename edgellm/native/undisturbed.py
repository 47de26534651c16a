"""Timing of what ggml's threads do together, on a machine that has other work too.

ggml's threads spin at a barrier after every operation. When another process gets a core, all of them wait for its time
slice to end: a product takes not twice but hundreds of times as long. So no average over such rounds says anything.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from statistics import median, quantiles
from typing import TypeVar

with suppress(ImportError):  # Windows has none
    import resource

Key = TypeVar("Key")

_ENOUGH = 16  # undisturbed rounds
_LEAST = 4  # rounds of a comparison, however busy the machine
_MOST = 3  # times as many rounds, where some are disturbed
_PATIENCE_S, _MORE_PATIENCE_S = 2.0, 10.0


def undisturbed(measure: Callable[[], float]) -> float:
    """The lower quartile of what `measure` returns, seconds, when no thread of this process loses its core meanwhile.

    The quartile, for others also take memory bandwidth, and that can't be seen. It ends after 16 such rounds; on a
    busy machine after 2 s, or 10 s without one, which gives the fastest of the others: too long a time.
    """
    calm: list[float] = []
    others: list[float] = []
    started = time.perf_counter()
    while len(calm) < _ENOUGH and time.perf_counter() - started < (_PATIENCE_S if calm else _MORE_PATIENCE_S):
        before = _preemptions()
        seconds = measure()
        (calm if _preemptions() == before else others).append(seconds)
    return quantiles(calm)[0] if len(calm) > 1 else min(calm or others)


def interleaved(
    measures: Mapping[Key, Callable[[], float]], patience: float, enough: int = _ENOUGH
) -> dict[Key, float]:
    """`undisturbed` of several things by turns, so that what slows the machine down for a while slows all of them.

    Seconds each: its median share of a round, times what a good round takes. So a slow minute, which hits whole rounds,
    doesn't count, nor does a sample that lost its core. It ends after `enough` rounds without such samples, after
    three times as many rounds, or after `patience` seconds, but not before four rounds (or `enough`, if that is less).
    Who begins changes from round to round: what ran before leaves its data in the caches.
    """
    calm: list[dict[Key, float]] = []
    others: list[dict[Key, float]] = []
    keys = list(measures)
    started = time.perf_counter()
    n_rounds = 0
    while n_rounds < min(_LEAST, enough) or (
        n_rounds < _MOST * enough and time.perf_counter() - started < patience and len(calm) < enough
    ):
        before = _preemptions()
        found = {key: measures[key]() for key in by_turns(keys, n_rounds)}
        (calm if _preemptions() == before else others).append(found)
        n_rounds += 1
    rounds = calm if len(calm) >= _LEAST else calm + others
    typical = [median(found.values()) for found in rounds]
    good = quantiles(typical)[0] if len(typical) > 1 else typical[0]
    return {
        key: good * median(found[key] / usual for found, usual in zip(rounds, typical, strict=True)) for key in keys
    }


def by_turns(items: Sequence[Key], i: int) -> list[Key]:
    """The items in the i-th round: another one begins, as a busy moment mustn't always meet the same."""
    i %= len(items)
    return [*items[i:], *items[:i]]


def _preemptions() -> int:
    """How often threads of this process were taken off a core against their will; always 0 where nobody counts."""
    try:
        return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
    except NameError:
        return 0

"""Timing of what ggml's threads do together, on a machine that has other work too.

ggml's threads spin at a barrier after every operation. When another process gets a core, all of them wait for its time
slice to end: a product takes not twice but hundreds of times as long. So no average over such rounds says anything.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from statistics import quantiles
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

    It ends when each was measured `enough` times undisturbed, after three times as many rounds, or after `patience`
    seconds, but not before each has been measured four times (or `enough`, if that is less). Who begins changes from
    round to round: what ran before leaves its data in the caches.
    """
    calm: dict[Key, list[float]] = {key: [] for key in measures}
    others: dict[Key, list[float]] = {key: [] for key in measures}
    keys = list(measures)
    started = time.perf_counter()
    n_rounds = 0
    while n_rounds < min(_LEAST, enough) or (
        n_rounds < _MOST * enough
        and time.perf_counter() - started < patience
        and any(len(found) < enough for found in calm.values())
    ):
        for key in keys[n_rounds % len(keys) :] + keys[: n_rounds % len(keys)]:
            before = _preemptions()
            seconds = measures[key]()
            (calm if _preemptions() == before else others)[key].append(seconds)
        n_rounds += 1
    return {key: quantiles(calm[key])[0] if len(calm[key]) > 1 else min(calm[key] or others[key]) for key in keys}


def _preemptions() -> int:
    """How often threads of this process were taken off a core against their will; always 0 where nobody counts."""
    try:
        return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
    except NameError:
        return 0

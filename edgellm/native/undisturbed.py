"""Timing of what ggml's threads do together, on a machine that has other work too.

ggml's threads spin at a barrier after every operation. When another process gets a core, all of them wait for its time
slice to end: a product takes not twice but hundreds of times as long. So no average over such rounds says anything.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from statistics import quantiles

with suppress(ImportError):  # Windows has none
    import resource

_ENOUGH = 16  # undisturbed rounds
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


def _preemptions() -> int:
    """How often threads of this process were taken off a core against their will; always 0 where nobody counts."""
    try:
        return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
    except NameError:
        return 0

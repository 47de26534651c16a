"""A budget met: look ahead, choose types, compensate, measure, and correct what was expected by what came out."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from converters.budget.allocate import Option, totals
from converters.budget.choose import Budget, Prospect, choose, curve, explained, file_type_of
from converters.budget.look import Place, look_ahead
from converters.calibrate import cache_path
from converters.compensation import Compensated, Job, compensate
from converters.original import scratch
from converters.plan import Plan
from converters.prepare import Overrides, plan_of
from converters.quantize.importance import Importance
from edgellm.errors import BudgetError, OutputError
from edgellm.measure.evaluate import evaluate
from edgellm.measure.scoring import Sample
from edgellm.measure.speed import decode_seconds_per_token

_VERSION = 3  # of what is found out before choosing: another one makes older files unknown
_ATTEMPTS = 3
_AIM = 0.95  # of a limit on the divergence
_TOO_GOOD = 0.85  # of a limit on the divergence: below, bytes are wasted and another attempt is made
_EVERY = 5  # sample is held out for measuring
_MOST_HELD_OUT = 8


@dataclass(frozen=True)
class Met:
    """What came of a budget. expected, measured: KL divergence on n_tokens held out; speed: measured tokens per second,
    None if none was asked for; reasons: where the bytes went; candidates: expected (bytes, KL divergence) of all sizes.
    """

    asked: str
    expected: float
    measured: float
    n_tokens: int
    n_bytes: int
    attempts: int
    speed: float | None = None
    reasons: tuple[str, ...] = ()
    candidates: tuple[Mapping[str, Any], ...] = field(default=(), repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def budget_folder(out: Path) -> Path:
    """Where what is only needed for the choice is kept meanwhile."""
    return out.with_name(f"{out.name}.budget.partial")


def held_out(samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """(for statistics and compensation, for measuring): disjoint where there is enough."""
    if len(samples) < _EVERY:
        return list(samples), list(samples)
    n = min(_MOST_HELD_OUT, len(samples) // _EVERY)
    chosen = {(2 * k + 1) * len(samples) // (2 * n) for k in range(n)}
    return [s for i, s in enumerate(samples) if i not in chosen], [samples[i] for i in sorted(chosen)]


@dataclass(frozen=True)
class Wish:
    """What is asked of a job. pins: types given by hand. compensates: whether rounding errors are compensated.
    more_metadata: what the file will hold besides the source's own.
    """

    budget: Budget
    pins: Overrides = ()
    importance: Importance | None = None
    compensates: bool = True
    more_metadata: Mapping[str, Any] = field(default_factory=dict)


def meet(job: Job, wish: Wish, planned: Plan) -> tuple[Compensated, Met]:
    """The plan that meets the budget, its bytes made, and what is known of it. planned: by any recipe.

    BudgetError where it can't be met, OutputError where there is no room for the work.
    """
    training, tuning = held_out(job.samples())
    with _folder(job.out) as folder:
        cache = cache_path(job.inputs, job.text).with_suffix(f".budget-{_VERSION}.json")
        place = Place(
            job.inputs, job.original, folder, job.memory, cache, wish.more_metadata, job.n_threads, job.on_progress
        )
        pins = [(re.compile(pattern), type_name.upper()) for pattern, type_name in wish.pins]
        prospect = look_ahead(place, planned, pins, training, tuning, wish.budget.min_speed is not None)
        prospect, speed = _checked_speed(job, wish, planned, prospect, folder)
        return _attempts(job, wish, planned, prospect, speed, training, tuning, folder)


@dataclass(frozen=True)
class _Trial:
    """A choice carried out: kld is what it measures on n_tokens, expected what it should have."""

    choice: Mapping[str, Option]
    made: Compensated
    expected: float
    kld: float
    n_tokens: int
    n_bytes: int


def _attempts(
    job: Job,
    wish: Wish,
    planned: Plan,
    prospect: Prospect,
    speed: float | None,
    training: Sequence[Sample],
    tuning: Sequence[Sample],
    folder: Path,
) -> tuple[Compensated, Met]:
    limit, last, good = None if wish.budget.is_soft else wish.budget.max_kld, None, None
    seen: list[tuple[float, float]] = []  # (damage, measured divergence) of the attempts
    while len(seen) < _ATTEMPTS:
        try:
            choice = choose(prospect, wish.budget, _AIM)
        except BudgetError:
            if good is None:
                raise
            break
        if last is not None and choice == last.choice:
            break  # nothing else is any nearer
        last = _try(job, wish, planned, prospect, choice, training, tuning, folder)
        seen.append((totals(choice).damage, last.kld))
        prospect = prospect.corrected(seen)
        if (limit is None or last.kld <= limit) and (good is None or last.n_bytes < good.n_bytes):
            good = last
        if limit is None or _TOO_GOOD * limit <= last.kld <= limit:
            break
    if good is None:
        assert last is not None
        raise BudgetError(
            f"{wish.budget.words()} was not met: the nearest after {len(seen)} attempts has {last.n_bytes:,} bytes and "
            f"a KL divergence of {last.kld:.4f}; allow that much, or calibrate with more effort"
        )
    if good is not last:  # whose bytes have taken the place of these
        made = _try(job, wish, planned, prospect, good.choice, training, tuning, folder).made
        good = replace(good, made=made)
    reasons, candidates = tuple(explained(prospect, good.choice)), tuple(curve(prospect))
    asked, n_attempts = wish.budget.words(), len(seen)
    return good.made, Met(
        asked, good.expected, good.kld, good.n_tokens, good.n_bytes, n_attempts, speed, reasons, candidates
    )


def _try(
    job: Job,
    wish: Wish,
    planned: Plan,
    prospect: Prospect,
    choice: Mapping[str, Option],
    training: Sequence[Sample],
    tuning: Sequence[Sample],
    folder: Path,
) -> _Trial:
    chosen, sums = _plan(job, wish, planned, choice), totals(choice)
    made = compensate(job, chosen, training) if wish.compensates else Compensated(chosen)
    with scratch(job.inputs, made.planned, folder / "trial", job.n_threads) as path:
        found = evaluate(path, tuning, reference=job.original.path, keep=folder / "kept")
    assert found.divergence is not None
    n_bytes = int(sums.n_bytes) + prospect.other_bytes  # the trial has no receipt in it
    kld = found.divergence.kld_mean.value
    return _Trial(choice, made, prospect.kld(sums.damage), kld, found.n_tokens, n_bytes)


def _plan(job: Job, wish: Wish, planned: Plan, choice: Mapping[str, Option]) -> Plan:
    """With just these types, and the pinned ones; tensors that nothing is chosen for stay what was planned for them."""
    chosen = [(f"^{re.escape(name)}$", option.type_name) for name, option in choice.items()]
    made = plan_of(job.inputs, planned.file_type, [*wish.pins, *chosen], wish.importance)
    return replace(made, file_type=file_type_of(choice))


def _checked_speed(
    job: Job, wish: Wish, planned: Plan, prospect: Prospect, folder: Path
) -> tuple[Prospect, float | None]:
    """What the kernels' times promise is measured on a file with the chosen types, and what was left out is added."""
    wanted, speed = wish.budget.min_speed, None
    if wanted is None:
        return prospect, None
    for _ in range(_ATTEMPTS):
        choice = choose(prospect, replace(wish.budget, max_kld=None))
        with scratch(job.inputs, _plan(job, wish, planned, choice), folder / "timed", job.n_threads) as path:
            seconds = decode_seconds_per_token(path, n_threads=job.n_threads)
        speed = 1 / seconds
        if speed >= wanted:
            break
        foretold = (prospect.overhead or 0.0) + totals(choice).seconds
        prospect = replace(prospect, overhead=(prospect.overhead or 0.0) + seconds - foretold)
    return prospect, speed


@contextmanager
def _folder(out: Path) -> Iterator[Path]:
    folder = budget_folder(out)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir()
        yield folder
    except OSError as exc:
        raise OutputError(f"cannot work in {folder}: {exc.strerror or exc}; make room there") from exc
    finally:
        shutil.rmtree(folder, ignore_errors=True)

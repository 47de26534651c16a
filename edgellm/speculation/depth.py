"""How many guesses to check at a time: from what checking costs here, and how often guesses were right lately.

Of guesses that are right with probability p each, one after another, a check of k yields (1 - p^(k+1)) / (1 - p) tokens
(Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding"). It costs as much as C(k + 1) plain
steps, plus what the guesses cost. The k with most tokens per second wins; 0 is one of them.
"""

from __future__ import annotations

from bisect import bisect
from collections import deque
from collections.abc import Iterable, Mapping
from operator import itemgetter
from statistics import median

from edgellm.speculation.drafts import GoesOn, Proposal

MAX_DRAFT = 24

# Steps that one evaluation of n tokens costs, before anything is measured: as on two slow cores, where it costs much.
_USUAL = {1: 1.0, 2: 1.7, 4: 2.4, 8: 3.8, 16: 6.0, 32: 11.0}
_USUAL_GUESS = 0.3  # steps that a guess of a draft model costs, where nothing may be measured
_KEPT = 9  # latest measurements of each kind
_STEPS_FIRST = 2  # costs are counted in plain steps, so these must be known
_TRUST = 2  # in how many of them the curve weighs as much: the first ones may be disturbed
_FORGETS = 0.97  # weight of older checks with each new one
_PRIOR_WEIGHT = 3.0  # guesses that a source's prior counts as
_RANGES = (0.2, 0.4, 0.6, 0.8, 0.95)  # of a draft's own probabilities; how often guesses are right is learned in each
_GAIN = 1.05  # less isn't worth the risk: the best of several estimates is mostly too good
_FOR_PROBES = 0.01  # share of the time that may go into trying again what didn't pay
_PROBE = 2  # guesses of such a trial


class Depth:
    """What was learned of costs and sources. It may serve many generations of one model."""

    def __init__(self, curve: Mapping[int, float] | None = None, *, looks_at_clock: bool = True) -> None:
        """curve: number of tokens evaluated together → cost in plain steps, where that was measured before.

        looks_at_clock: False chooses by the curve and by what was right alone, so that the same guesses are checked
        when the same answer is asked for again: the number of tokens evaluated together can turn a tie.
        """
        self._looks_at_clock = looks_at_clock
        self._steps: deque[float] = deque(maxlen=_KEPT)  # seconds of plain steps
        self._checks: dict[int, deque[float]] = {}  # number of tokens → costs in plain steps
        self._off: deque[float] = deque(maxlen=_KEPT)  # latest costs of any number of tokens, as shares of the curve's
        self._curve = dict(_USUAL if curve is None else {1: 1.0, **curve})
        self._sources: dict[str, _Source] = {}
        self._for_probes = 0.0  # seconds

    def choose(self, source: str, most: int, prior: float) -> int:
        """How many guesses of the source to check; at most `most`. prior: how often one is right, as far as anybody
        knows before any was checked.
        """
        if len(self._steps) < _STEPS_FIRST:
            return 0
        known = self._sources.setdefault(source, _Source(prior))
        gain, best = self._best(known, most)
        if gain >= _GAIN:
            return best
        probe = min(_PROBE, most)
        known.probes = self._loss(known, probe) <= self._for_probes
        return probe if known.probes else 0

    def goes_on(self, source: str, k: int) -> GoesOn:
        """For a draft whose guesses take time, and of which k were chosen: whether to make the next one, told by the
        probability that the draft gives it. It must be right at least as often as it costs a plain step's time.
        """
        known = self._sources[source]
        per_guess = (self._expense(known, k) - self._expense(known, 1)) / max(1, k - 1)
        chance = 1.0

        def goes_on(probability: float) -> bool:
            nonlocal chance
            chance *= known.chance(probability)
            return chance >= per_guess

        return goes_on

    def gain(self, source: str, most: int, prior: float) -> float:
        """Tokens for each plain step's time that a check of at most `most` of these guesses may bring; 0 = unknown."""
        if len(self._steps) < _STEPS_FIRST:
            return 0.0
        return self._best(self._sources.setdefault(source, _Source(prior)), most)[0]

    def step_took(self, seconds: float) -> None:
        """A plain step: one token evaluated and the next one chosen."""
        seconds = seconds if self._looks_at_clock else 1.0
        self._steps.append(seconds)
        self._for_probes += _FOR_PROBES * seconds

    def check_took(self, proposal: Proposal, n_accepted: int, seconds: float, draft_seconds: float) -> None:
        """A check of these guesses, of which the first n_accepted were right. draft_seconds: until they were there."""
        source, n = self._sources.setdefault(proposal.source, _Source(proposal.prior)), len(proposal.tokens)
        per_guess = proposal.seconds_per_guess
        if not self._looks_at_clock:
            per_guess = _USUAL_GUESS if per_guess else 0.0
            seconds, draft_seconds = _between(self._curve, n + 1), n * per_guess
        source.learn(proposal, n_accepted, per_guess)
        source.catching_up = max(0.0, draft_seconds - n * per_guess)
        self._for_probes += _FOR_PROBES * seconds
        if not self._steps:
            return
        # a machine that is busy meanwhile can show any cost; n tokens together never cost more than n alone
        cost = min(seconds / self._step_seconds, n + 1.0)
        self._checks.setdefault(n + 1, deque(maxlen=_KEPT)).append(cost)
        self._off.append(cost / _between(self._curve, n + 1))
        if source.probes:
            self._for_probes -= max(0.0, seconds + draft_seconds - (n_accepted + 1) * self._step_seconds)
            source.probes = False

    def cost(self, n_tokens: int) -> float:
        """Of evaluating n_tokens together, in plain steps: as measured, or by the curve through what was.

        Where there are few measurements, the curve is taken to be as wrong as it was lately for any number of tokens.
        """
        expected = _between(self._curve, n_tokens)
        near = min(self._checks, key=lambda n: abs(n - n_tokens), default=None)
        if near is None:
            return expected
        there = _between(self._curve, near)
        everywhere = median([*self._off, *[1.0] * _TRUST])
        return expected * median([*self._checks[near], *[there * everywhere] * _TRUST]) / there

    @property
    def _step_seconds(self) -> float:
        return median(self._steps)

    def _best(self, source: _Source, most: int) -> tuple[float, int]:
        """The greatest gain, and how many guesses bring it: of equal ones the fewest."""
        gains = ((self._gain(source, k), k) for k in range(1, min(most, MAX_DRAFT) + 1))
        return max(gains, key=itemgetter(0), default=(0.0, 0))

    def _gain(self, source: _Source, k: int) -> float:
        """Tokens for each plain step's time."""
        return source.expected(k) / self._expense(source, k)

    def _expense(self, source: _Source, k: int) -> float:
        return self.cost(k + 1) + k * source.seconds_per_guess / self._step_seconds

    def _loss(self, source: _Source, k: int) -> float:
        """Seconds that checking k guesses costs in vain where none of them is right."""
        return max(0.0, self._expense(source, k) - 1.0) * self._step_seconds + source.catching_up


class _Source:
    def __init__(self, prior: float) -> None:
        self.right, self.wrong = prior * _PRIOR_WEIGHT, (1 - prior) * _PRIOR_WEIGHT
        self.ranges = [[0.0, 0.0] for _ in range(len(_RANGES) + 1)]  # guesses right and wrong
        self.seconds_per_guess = 0.0
        self.catching_up = 0.0  # seconds that it took the last time before the first guess, to read what it had missed
        self.probes = False  # it was chosen though it doesn't pay, to see whether it does by now

    def learn(self, proposal: Proposal, n_accepted: int, seconds_per_guess: float) -> None:
        self.right = _FORGETS * self.right + n_accepted
        self.wrong = _FORGETS * self.wrong + (n_accepted < len(proposal.tokens))
        self.seconds_per_guess = seconds_per_guess
        for i, probability in enumerate(proposal.probabilities[: n_accepted + 1]):
            counts = self.ranges[bisect(_RANGES, probability)]
            counts[:] = [_FORGETS * count for count in counts]
            counts[i >= n_accepted] += 1

    def chance(self, probability: float) -> float:
        """How often guesses were right that the draft gave such a probability; before any was checked, just that."""
        right, wrong = self.ranges[bisect(_RANGES, probability)]
        return (right + _PRIOR_WEIGHT * probability) / (right + wrong + _PRIOR_WEIGHT)

    def expected(self, k: int) -> float:
        """Tokens of a check of k guesses: those that are right, and the one the model gives itself."""
        p = min(self.right / (self.right + self.wrong), 0.995)
        return float((1 - p ** (k + 1)) / (1 - p))


def _between(curve: Mapping[int, float], n: int) -> float:
    """The piecewise linear curve at n; beyond its ends it goes on as its last piece."""
    known: Iterable[int] = sorted(curve)
    below = max((x for x in known if x <= n), default=min(curve))
    above = min((x for x in known if x >= n), default=max(curve))
    if below == above:
        if below == n or len(curve) == 1:
            return curve[below]
        below, above = sorted(curve)[-2:]
    return curve[below] + (curve[above] - curve[below]) * (n - below) / (above - below)

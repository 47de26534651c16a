"""Drafts: what guesses the next tokens. The model checks every guess, so a wrong one costs time and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias

if TYPE_CHECKING:
    from edgellm.constraint import Matcher

DraftChoice: TypeAlias = str | Path | Sequence[str | Path]  # auto, off, ngram, a file after ngram; or just these

_NEEDLE = 2  # tokens that must match before anything is guessed
_CANDIDATES = 16  # latest places looked at
_LONGEST = 32  # tokens a match is followed back
_LENGTHS = (3, 5, 9, 17)  # matches at least this long are sources of their own
# How often guesses after matches of these lengths were right in answers of a small model to 30 questions; after short
# ones it makes a difference whether all places agree.
_RIGHT = (0.62, 0.74, 0.82, 0.88, 0.97)
_AGREEMENT, _SHORT = {"once": 0.0, "agreed": 0.05, "disputed": -0.07}, 2


class Proposal(NamedTuple):
    """tokens: guesses, the likeliest continuation first to last. source: guesses of one source are about as often
    right; how often is learned for each. seconds_per_guess: what one more of them costs; 0 = nothing to speak of.
    prior: how often one of this source is right, before anything was learned. probabilities: that the draft itself
    gives its guesses, where it has any.
    """

    tokens: Sequence[int]
    source: str
    seconds_per_guess: float = 0.0
    prior: float = 0.7
    probabilities: Sequence[float] = ()


NOTHING = Proposal((), "")


GoesOn: TypeAlias = Callable[[float], bool]  # whether a next guess is wanted that the draft gives this probability


def always(_: float) -> bool:
    return True


class Draft(Protocol):
    """is_free: a guess costs next to nothing, so that how many of them are checked may be decided afterwards."""

    name: str
    is_free: bool

    def propose(self, history: Sequence[int], k: int, goes_on: GoesOn = always, /) -> Proposal:
        """At most k tokens that may follow `history`. During one generation `history` only grows.

        goes_on: where guesses take time, it is asked about each but the first, and ends them.
        """
        ...


class NgramDraft:
    """The text repeats itself: guesses what followed the latest place where the longest end of it stood before.

    One for each generation. Memory: some hundred bytes for each token of the history.
    """

    name = "ngram"
    is_free = True

    def __init__(self) -> None:
        self._places: dict[tuple[int, ...], list[int]] = {}  # of every needle: where the token after it stands
        self._n_indexed = _NEEDLE  # a needle ends before this place; the one at the very end isn't there yet

    def propose(self, history: Sequence[int], k: int, _: GoesOn = always) -> Proposal:
        for place in range(self._n_indexed, len(history)):
            self._places.setdefault(tuple(history[place - _NEEDLE : place]), []).append(place)
        self._n_indexed = max(self._n_indexed, len(history))
        places = self._places.get(tuple(history[-_NEEDLE:]), ())[-_CANDIDATES:]
        if not places:
            return NOTHING
        length, place = max((_match_length(history, place), place) for place in places)
        followed = [history[place] for place in places]
        return after_match(self.name, _continued(history, place, k), length, followed)


class ForcedDraft:
    """What the form of the answer leaves no choice about, such as the keys of a JSON object."""

    name = "forced"
    is_free = True

    def __init__(self, matcher: Matcher) -> None:
        """matcher: has taken every token of the history that belongs to the answer."""
        self._matcher = matcher

    def propose(self, history: Sequence[int], k: int, _: GoesOn = always) -> Proposal:
        return Proposal(self._matcher.forced()[:k], self.name, prior=0.99)


def after_match(kind: str, tokens: Sequence[int], length: int, followed: Sequence[Hashable]) -> Proposal:
    """Guesses after a match of so many tokens. followed: what did so wherever these tokens stood before.

    The source tells the length, as after longer matches guesses are right more often, and whether all places agree.
    """
    agreement = "once" if len(followed) == 1 else "agreed" if len(set(followed)) == 1 else "disputed"
    length_class = sum(length >= bound for bound in _LENGTHS)
    prior = _RIGHT[length_class] + (_AGREEMENT[agreement] if length_class < _SHORT else 0.0)
    return Proposal(tokens, f"{kind} {length_class} {agreement}", prior=prior)


def _match_length(history: Sequence[int], place: int) -> int:
    """How many tokens before `place` equal those at the end of the history; at most _LONGEST."""
    n, end = _NEEDLE, len(history)
    most = min(place, _LONGEST)
    while n < most and history[place - 1 - n] == history[end - 1 - n]:
        n += 1
    return n


def _continued(history: Sequence[int], place: int, k: int) -> list[int]:
    """k tokens from `place` on; where the history ends they go on with themselves, as in a text that repeats."""
    tokens = list(history[place : place + k])
    period = len(tokens)
    while len(tokens) < k:
        tokens.append(tokens[-period])
    return tokens

"""Which of several drafts is checked: the most promising, and a model isn't asked for nothing."""

from __future__ import annotations

from collections.abc import Sequence

from edgellm.speculation.depth import Depth
from edgellm.speculation.drafts import NOTHING, GoesOn, Proposal, always
from edgellm.speculation.verify import Speculator


class Fixed:
    """Guesses the same at every place, or nothing."""

    def __init__(self, name: str, tokens: Sequence[int], is_free: bool = True) -> None:
        self.name, self.is_free, self._tokens = name, is_free, tokens
        self.asked = 0

    def propose(self, history: Sequence[int], k: int, _: GoesOn = always) -> Proposal:
        self.asked += 1
        return Proposal(self._tokens[:k], self.name) if self._tokens else NOTHING


def learned(seconds: float = 0.0105, **right: int) -> Depth:
    """Sources that were right so often out of ten times, on a machine that checks a guess in so many seconds."""
    depth = Depth({1: 1.0, 2: 1.05, 32: 1.5})
    for _ in range(9):
        depth.step_took(0.01)
    for name, n in right.items():
        for i in range(10):
            depth.check_took(Proposal((1,), name), int(i < n), seconds, 0.0)
    return depth


def test_of_free_drafts_the_one_that_is_right_more_often_is_checked() -> None:
    a, b = Fixed("a", [1, 1, 1, 1]), Fixed("b", [2, 2, 2, 2])
    assert set(Speculator([a, b], learned(a=3, b=9)).propose([0], 8).tokens) == {2}
    assert set(Speculator([a, b], learned(a=9, b=3)).propose([0], 8).tokens) == {1}
    assert set(Speculator([b, a], learned(a=9, b=3)).propose([0], 8).tokens) == {1}


def test_a_longer_guess_wins_at_equal_odds() -> None:
    a, b = Fixed("a", [1]), Fixed("b", [2, 2, 2, 2])
    assert set(Speculator([a, b], learned(a=8, b=8)).propose([0], 8).tokens) == {2}


def test_a_model_is_asked_where_free_drafts_know_nothing() -> None:
    free, model = Fixed("free", []), Fixed("model", [3, 3], is_free=False)
    assert set(Speculator([free, model], learned(model=9)).propose([0], 8).tokens) == {3}
    knows = Fixed("free", [1] * 8)
    asked = model.asked
    assert set(Speculator([model, knows], learned(free=9, model=8)).propose([0], 8).tokens) == {1}
    assert model.asked == asked


def test_a_model_that_promises_more_is_asked_first() -> None:
    free, model = Fixed("free", [1, 1]), Fixed("model", [3, 3, 3, 3], is_free=False)
    assert set(Speculator([free, model], learned(free=5, model=9)).propose([0], 8).tokens) == {3}
    silent = Fixed("model", [], is_free=False)
    assert set(Speculator([free, silent], learned(free=5, model=9)).propose([0], 8).tokens) == {1}


def test_what_never_was_right_is_not_checked() -> None:
    free, model = Fixed("free", [1, 1]), Fixed("model", [3, 3], is_free=False)
    assert Speculator([free, model], learned(0.018, free=0, model=0)).propose([0], 8) == NOTHING
    assert Speculator([free], learned(free=9)).propose([0], 0) == NOTHING

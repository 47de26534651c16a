"""N-gram drafts against a search by brute force."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgellm.speculation.drafts import NOTHING, NgramDraft, after_match


def latest_of_the_longest(history: list[int]) -> tuple[int, int, list[int]]:
    """(place, length) of the best match, and what followed all of them; only the 16 latest places where the last two
    tokens stood count."""
    places = [p for p in range(2, len(history)) if history[p - 2 : p] == history[-2:]][-16:]
    best = (-1, 0)
    for place in places:
        equal = [n for n in range(2, min(place, 32) + 1) if history[place - n : place] == history[len(history) - n :]]
        length = max(equal)
        if length >= best[1]:
            best = (place, length)
    return (*best, [history[place] for place in places])


def endless(tokens: list[int], place: int, k: int) -> list[int]:
    """k tokens from a place on, in a text that goes on as it is guessed to."""
    text = list(tokens)
    for i in range(k):
        text.append(text[place + i])
    return text[len(tokens) :]


@given(st.lists(st.integers(0, 2), min_size=1, max_size=120), st.integers(1, 12))
def test_it_guesses_what_followed_the_latest_longest_match(history: list[int], k: int) -> None:
    place, length, followed = latest_of_the_longest(history)
    proposal = NgramDraft().propose(history, k)
    if not length:
        assert proposal == NOTHING
    else:
        assert proposal == after_match("ngram", endless(history, place, k), length, followed)


@given(st.lists(st.integers(0, 2), min_size=4, max_size=60), st.data())
def test_a_history_that_grew_is_like_a_new_one(history: list[int], data: st.DataObject) -> None:
    draft = NgramDraft()
    for n in sorted(data.draw(st.lists(st.integers(1, len(history)), max_size=5))):
        assert draft.propose(history[:n], 4) == NgramDraft().propose(history[:n], 4)
    assert draft.propose(history, 4) == NgramDraft().propose(history, 4)


def test_nothing_repeats_nothing_is_guessed() -> None:
    assert NgramDraft().propose(list(range(50)), 8) == NOTHING
    assert NgramDraft().propose([], 8) == NOTHING
    assert NgramDraft().propose([1], 8) == NOTHING


@pytest.mark.parametrize(("length", "expected"), [(2, 0), (3, 1), (4, 1), (5, 2), (8, 2), (9, 3), (17, 4), (32, 4)])
def test_longer_matches_are_other_sources(length: int, expected: int) -> None:
    assert after_match("ngram", [5], length, [5]).source == f"ngram {expected} once"
    assert after_match("ngram", [5], length, [5]).prior <= after_match("ngram", [5], length + 1, [5]).prior


def test_whether_matches_agree_makes_other_sources() -> None:
    def proposed(history: list[int]) -> tuple[list[int], str]:
        proposal = NgramDraft().propose(history, 1)
        return list(proposal.tokens), proposal.source

    history = [1, 2, 3, 9, 1, 2, 3, 9, 1, 2]
    assert proposed(history) == ([3], "ngram 2 agreed")
    assert proposed([1, 2, 4, *history]) == ([3], "ngram 2 disputed")
    assert proposed([1, 2, 4, 8, 1, 2]) == ([4], "ngram 0 once")
    priors = [after_match("ngram", [5], 2, followed).prior for followed in ([5, 6], [5], [5, 5])]
    assert priors == sorted(priors)

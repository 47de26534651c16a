"""The choice of depth in simulated worlds: known costs, known chances, a clock that only counts."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest

from edgellm.speculation.depth import MAX_DRAFT, Depth
from edgellm.speculation.drafts import Proposal

STEP, PRIOR = 0.01, 0.7
FLAT = {1: 1.0, 2: 1.05, 4: 1.1, 8: 1.3, 25: 2.5}  # memory-bound: more tokens at once cost little
STEEP = {1: 1.0, 2: 1.9, 4: 3.5, 8: 7.0, 25: 22.0}  # compute-bound


def between(curve: dict[int, float], n: int) -> float:
    return float(np.interp(n, list(curve), list(curve.values())))


def simulate(
    depth: Depth,
    curve: dict[int, float],
    chance: Callable[[int], float],
    n_tokens: int,
    *,
    per_guess: float = 0.0,
    noise: float = 0.0,
    seed: int = 0,
) -> float:
    """Speed against plain steps. chance: that a guess is right, by the number of tokens so far."""
    rng = random.Random(seed)
    n, seconds = 0, 0.0
    while n < n_tokens:
        k = depth.choose("draft", MAX_DRAFT, PRIOR)
        disturbed = 1 + noise * rng.random() ** 8
        if not k:
            seconds += STEP * disturbed
            depth.step_took(STEP * disturbed)
            n += 1
            continue
        right = next((i for i in range(k) if rng.random() >= chance(n)), k)
        took, guessing = between(curve, k + 1) * STEP * disturbed, k * per_guess * STEP
        depth.check_took(Proposal([0] * k, "draft", per_guess * STEP), right, took, guessing)
        seconds += took + guessing
        n += right + 1
    return n * STEP * (1 + noise / 9) / seconds


@pytest.mark.parametrize("curve", [FLAT, STEEP], ids=["flat", "steep"])
@pytest.mark.parametrize("p", [0.0, 0.05, 0.1])
@pytest.mark.parametrize("per_guess", [0.0, 0.25])
def test_a_hostile_draft_costs_next_to_nothing(curve: dict[int, float], p: float, per_guess: float) -> None:
    assert simulate(Depth(curve), curve, lambda _: p, 2000, per_guess=per_guess) >= 0.98


@pytest.mark.parametrize("p", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("per_guess", [0.0, 0.25])
def test_it_comes_near_the_best_constant_depth(p: float, per_guess: float) -> None:
    best = max((1 - p ** (k + 1)) / (1 - p) / (between(FLAT, k + 1) + k * per_guess) for k in range(1, MAX_DRAFT + 1))
    assert simulate(Depth(FLAT), FLAT, lambda _: p, 4000, per_guess=per_guess) >= 0.93 * best


def test_it_learns_the_curve_where_the_usual_one_is_wrong() -> None:
    depth = Depth()
    assert simulate(depth, STEEP, lambda _: 0.5, 4000) >= 0.98
    assert depth.cost(3) == pytest.approx(2.7, rel=0.1)


def test_a_draft_that_gets_better_is_noticed() -> None:
    depth = Depth(FLAT)
    simulate(depth, FLAT, lambda _: 0.0, 3000)
    assert simulate(depth, FLAT, lambda _: 0.9, 3000) > 2


def test_disturbed_timings_do_not_turn_a_good_draft_off() -> None:
    assert simulate(Depth(FLAT), FLAT, lambda _: 0.8, 4000, noise=20.0) > 1.5


def test_the_first_measurements_of_a_busy_machine_are_not_trusted() -> None:
    depth = Depth(FLAT)
    for _ in range(3):
        depth.step_took(STEP)
    depth.check_took(Proposal([0] * 4, "draft"), 4, 50 * STEP, 0.0)
    assert depth.cost(5) < 2
    assert depth.choose("draft", 4, PRIOR) == 4


@pytest.mark.parametrize("looks_at_clock", [True, False])
@pytest.mark.parametrize("n_right", [0, 1])
def test_trying_what_does_not_pay_takes_a_hundredth_of_the_time(looks_at_clock: bool, n_right: int) -> None:
    curve = {1: 1.0, 2: 1.9, 3: 2.4, 25: 22.0}
    depth, tried, lost = Depth(curve, looks_at_clock=looks_at_clock), 0, 0.0
    for _ in range(3000):
        if k := depth.choose("poor", 8, 0.4):
            tried += 1
            lost += between(curve, k + 1) - (n_right + 1)
            depth.check_took(Proposal([0] * k, "poor"), n_right, between(curve, k + 1) * STEP, 0.0)
        else:
            depth.step_took(STEP)
    assert tried >= 10
    assert lost <= 0.012 * 3000


def test_a_draft_that_must_read_first_is_tried_more_seldom() -> None:
    def n_tried(reading: float) -> int:
        depth, tried = Depth({1: 1.0, 2: 1.9, 3: 2.4, 25: 22.0}), 0
        for _ in range(5000):
            if k := depth.choose("poor", 8, 0.4):
                tried += 1
                depth.check_took(Proposal([0] * k, "poor", 0.1 * STEP), 0, 2.4 * STEP, (0.1 * k + reading) * STEP)
            else:
                depth.step_took(STEP)
        return tried

    assert n_tried(0.0) >= 25
    assert 2 <= n_tried(12.0) <= 5  # a hundredth of the time is 50 steps


def test_a_new_source_begins_with_its_prior() -> None:
    depth = Depth(FLAT)
    depth.step_took(STEP)
    depth.step_took(STEP)
    assert depth.choose("long", MAX_DRAFT, 0.97) > depth.choose("short", MAX_DRAFT, 0.6) > 0
    assert depth.gain("long", 4, 0.97) > depth.gain("short", 4, 0.6) > 1


def wanted(depth: Depth, probabilities: list[float]) -> int:
    goes_on = depth.goes_on("model", 8)
    return next((i for i, probability in enumerate(probabilities) if not goes_on(probability)), len(probabilities))


def asked(depth: Depth) -> None:
    depth.step_took(STEP)
    depth.step_took(STEP)
    assert depth.choose("model", 8, 0.85)


def test_a_costly_guess_is_made_while_it_is_likely_enough_to_pay() -> None:
    cheap, dear = Depth(FLAT), Depth({1: 1.0, 2: 1.3, 25: 12.0})
    asked(cheap)
    asked(dear)
    assert wanted(cheap, [0.5] * 8) == 4  # a guess more costs .04 steps, so 1/16 pays, and 1/32 doesn't
    assert wanted(dear, [0.5] * 8) == 1  # .47 steps
    assert wanted(dear, [0.99] * 8) == 8


@pytest.mark.parametrize("right", [True, False])
def test_a_drafts_probabilities_count_as_what_they_were_worth(right: bool) -> None:
    """A draft that is unsure may be right all the same, and a sure one wrong: each range is learned by itself."""
    depth = Depth({1: 1.0, 2: 1.3, 25: 12.0})
    asked(depth)
    before = wanted(depth, [0.3] * 8), wanted(depth, [0.9] * 8)
    for _ in range(30):
        tokens, probability = [0] * 2, 0.3 if right else 0.9
        proposal = Proposal(tokens, "model", 0.01 * STEP, probabilities=[probability] * 2)
        depth.check_took(proposal, 2 if right else 0, 1.77 * STEP, 0.02 * STEP)
    after = wanted(depth, [0.3] * 8), wanted(depth, [0.9] * 8)
    if right:
        assert after[0] >= before[0] + 4
    else:
        assert after[1] == 0
        assert after[0] == before[0]


def test_no_more_is_chosen_than_there_is() -> None:
    depth = Depth(FLAT)
    assert depth.choose("draft", 10, PRIOR) == 0  # what a plain step costs isn't known yet
    depth.step_took(STEP)
    depth.step_took(STEP)
    assert depth.choose("draft", 0, PRIOR) == 0
    assert depth.choose("draft", 3, PRIOR) <= 3
    assert depth.choose("draft", 1000, PRIOR) <= MAX_DRAFT


def test_without_the_clock_only_what_was_right_decides() -> None:
    def choices(seconds: float) -> list[int]:
        depth, found = Depth(looks_at_clock=False), []
        for i in range(200):
            found.append(k := depth.choose("draft", 8, PRIOR))
            if k:
                depth.check_took(Proposal([0] * k, "draft"), k if i % 3 else 0, seconds * i, 0.0)
            else:
                depth.step_took(seconds / (i + 1))
        return found

    assert choices(0.001) == choices(7.0)
    assert max(choices(1.0)) > 0


def test_costs_between_measured_ones_follow_the_curve() -> None:
    depth = Depth({2: 1.5, 4: 2.5})
    assert [depth.cost(n) for n in (1, 2, 3, 4)] == [1.0, 1.5, 2.0, 2.5]
    assert depth.cost(6) == pytest.approx(3.5)

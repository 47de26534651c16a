"""The choice of types against every possible choice, on instances small enough to try them all."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest

from converters.budget.allocate import Limits, Option, Totals, allocate, frontier, totals

Options = dict[str, list[Option]]
_SEEDS = range(6)
_BITS = {"Q2_K": 2.625, "Q3_K": 3.4375, "Q4_0": 4.5, "Q5_1": 6.0, "Q6_K": 6.5625, "Q8_0": 8.5}


def instance(seed: int, n_tensors: int = 5) -> Options:
    """Tensors of different sizes; more bits usually mean less damage, and time follows bytes only roughly. Some types
    are missing from some tensors.
    """
    rng = np.random.default_rng(seed)
    options: Options = {}
    for i in range(n_tensors):
        n_weights, harm = int(rng.integers(8, 200)) * 256, 10 ** rng.uniform(-3, -1)
        row = [
            Option(
                name,
                int(n_weights * bits / 8),
                float(harm * 4**-bits * rng.uniform(0.6, 1.6)),
                float(n_weights * bits * rng.uniform(0.7, 1.4) * 1e-9),
            )
            for name, bits in _BITS.items()
        ]
        kept = rng.permutation(len(row))[: rng.integers(2, len(row) + 1)]
        options[f"t{i}"] = [row[j] for j in sorted(kept)]
    return options


class Brute:
    """All choices: what each comes to."""

    def __init__(self, options: Options) -> None:
        rows = [[(o.n_bytes, o.damage, o.seconds) for o in row] for row in options.values()]
        self.sums = np.array([np.sum(picked, axis=0) for picked in product(*rows)])
        self.n_bytes, self.damage, self.seconds = self.sums.T

    def fits(self, limits: Limits, slack: float = 0.0) -> np.ndarray:
        room = np.array([limits.n_bytes, limits.damage, limits.seconds]) * (1 - slack)
        found: np.ndarray = (self.sums <= room).all(axis=1)
        return found


def quantile(values: np.ndarray, share: float) -> float:
    """A limit somewhere between the least and the most there is, which no choice reaches to the last digit."""
    low, high = float(values.min()), float(values.max())
    return low + share * (high - low)


def chosen(options: Options, limits: Limits) -> Totals | None:
    """What the choice comes to; it has an option of each tensor's own for every tensor, and stays within the limits."""
    found = allocate(options, limits)
    if found is None:
        return None
    assert list(found) == list(options)
    assert all(option in options[name] for name, option in found.items())
    sums = totals(found)
    assert sums.within(limits)
    assert sums.n_bytes == sum(option.n_bytes for option in found.values())
    return sums


@pytest.mark.parametrize("seed", _SEEDS)
@pytest.mark.parametrize("name", ["n_bytes", "seconds"])
def test_least_damage_within_one_limit(name: str, seed: int) -> None:
    options = instance(seed)
    brute = Brute(options)
    for share in (0.0, 0.02, 0.1, 0.3, 0.6, 0.9, 1.0):
        limits = Limits(**{name: quantile(getattr(brute, name), share) * (1 + 1e-12)})
        found = chosen(options, limits)
        assert found is not None
        best = brute.damage[brute.fits(limits)].min()
        assert best * (1 - 1e-9) <= found.damage <= 1.6 * best
    assert found.damage == pytest.approx(brute.damage.min())  # with all the room there is
    assert chosen(options, Limits(**{name: quantile(getattr(brute, name), 0.0) * (1 - 1e-9)})) is None


@pytest.mark.parametrize("seed", _SEEDS)
def test_fewest_bytes_within_a_damage(seed: int) -> None:
    options = instance(seed)
    brute = Brute(options)
    for exponent in (0.0, 0.1, 0.4, 0.7, 1.0):
        limit = float(brute.damage.min() ** (1 - exponent) * brute.damage.max() ** exponent) * (1 + 1e-9)
        found = chosen(options, Limits(damage=limit))
        assert found is not None
        best = brute.n_bytes[brute.fits(Limits(damage=limit))].min()
        assert best <= found.n_bytes <= 1.12 * best
    assert chosen(options, Limits(damage=float(brute.damage.min()) * (1 - 1e-9))) is None


@pytest.mark.parametrize("seed", _SEEDS)
def test_limits_together(seed: int) -> None:
    """Where choices fit with 8 % of each limit to spare, one is found that is not far from the best; where no choice
    fits there is none.
    """
    options = instance(seed)
    brute = Brute(options)
    rng = np.random.default_rng(seed)
    n_found = n_none = 0
    for _ in range(30):
        a, b, c = rng.uniform(0.05, 0.7, 3)
        damage = float(brute.damage.min() ** (1 - c) * brute.damage.max() ** c)
        limits = Limits(quantile(brute.n_bytes, a), damage, quantile(brute.seconds, b))
        for some in (limits, Limits(limits.n_bytes, damage), Limits(np.inf, damage, limits.seconds)):
            found, fits, easily = chosen(options, some), brute.fits(some), brute.fits(some, 0.08)
            if found is None:
                assert not easily.any()
                n_none += not fits.any()
            else:
                n_found += 1
                if easily.any():  # damage is limited: the smaller the better
                    assert found.n_bytes <= 1.2 * brute.n_bytes[easily].min()
    assert n_found > 3
    assert n_none > 3


def test_equal_to_the_best_where_the_room_is_filled_exactly() -> None:
    """Tensors of one size and types of whole steps: the greedy choice is the optimum, and uses all the room."""
    steps = {"A": (100, 8.0), "B": (200, 3.0), "C": (300, 1.0)}
    options = {
        f"t{i}": [Option(name, n, harm * (i + 1), n * 1e-3) for name, (n, harm) in steps.items()] for i in range(6)
    }
    brute = Brute(options)
    for room in range(600, 1801, 100):
        for limits in (Limits(n_bytes=room), Limits(seconds=room * 1e-3 + 1e-9)):
            found = chosen(options, limits)
            assert found is not None
            assert found.damage == pytest.approx(brute.damage[brute.fits(limits)].min())
            assert found.n_bytes == room
        damage = found.damage + 1e-9
        fewest = chosen(options, Limits(damage=damage))
        assert fewest is not None
        assert fewest.n_bytes == brute.n_bytes[brute.fits(Limits(damage=damage))].min()


def test_without_limits_the_best_of_all() -> None:
    options = {"a": [Option("Q8_0", 30, 0.1), Option("Q4_0", 10, 0.2)], "b": [Option("F16", 5, 0.0)]}
    assert allocate(options, Limits()) == {"a": options["a"][0], "b": options["b"][0]}


def test_tensors_that_do_no_harm_take_no_room() -> None:
    """Nothing is known to be gained by more bits: the smallest type, also where there is room for larger ones."""
    options = {"a": [Option("Q8_0", 30, 0.0), Option("Q4_0", 10, 0.0)], "b": [Option("Q8_0", 30, 0.1)]}
    found = allocate(options, Limits(damage=0.2))
    assert found is not None
    assert {name: option.type_name for name, option in found.items()} == {"a": "Q4_0", "b": "Q8_0"}


@pytest.mark.parametrize("seed", _SEEDS)
def test_frontier_is_monotone(seed: int) -> None:
    options = instance(seed)
    found, brute = frontier(options), Brute(options)
    assert len(found) > 5
    assert all(a.n_bytes < b.n_bytes and a.damage > b.damage for a, b in pairwise(found))
    assert found[0].n_bytes == brute.n_bytes.min()
    assert found[-1].damage == pytest.approx(brute.damage.min())
    for point in found:  # each is the best of its size
        within = brute.n_bytes <= point.n_bytes
        assert point.damage == pytest.approx(brute.damage[within].min())

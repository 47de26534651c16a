"""One small optimization: a type for every tensor, the least damage within the limits.

Lagrangian relaxation (Everett 1963): with prices for a byte and for a second each tensor's best option is found alone;
the prices are searched by bisection, and what room is left is filled greedily.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Priced = Callable[[float], "NDArray[np.intp] | None"]  # a price → the choice at it

_STEPS = 36  # of a bisection, to a billionth of a price
_SIZES = 20  # tried, to a millionth of the range
_DEAREST = 1e12  # a price at which nothing but the priced thing counts
_NEVER = 1e30  # bytes of an option that there isn't; finite, as its price may be 0


@dataclass(frozen=True)
class Option:
    """A tensor in a type. damage: the KL divergence it adds, in nats; seconds: of one token's decoding."""

    type_name: str
    n_bytes: int
    damage: float
    seconds: float = 0.0


@dataclass(frozen=True)
class Limits:
    """At most so much, in sum; infinite: as much as it takes."""

    n_bytes: float = np.inf
    damage: float = np.inf
    seconds: float = np.inf


@dataclass(frozen=True)
class Totals:
    """What a choice comes to."""

    n_bytes: float
    damage: float
    seconds: float

    def within(self, limits: Limits) -> bool:
        return self.n_bytes <= limits.n_bytes and self.damage <= limits.damage and self.seconds <= limits.seconds


Choice = Mapping[str, Option]


def totals(choice: Choice) -> Totals:
    """The sums over a choice."""
    options = choice.values()
    return Totals(*(float(sum(getattr(o, name) for o in options)) for name in ("n_bytes", "damage", "seconds")))


def allocate(options: Mapping[str, Sequence[Option]], limits: Limits) -> dict[str, Option] | None:
    """An option for every tensor: the least damage within the limits; where damage is limited, the fewest bytes within
    them. None where nothing fits.
    """
    table = _Table(options)
    wanted = _fewest_bytes(table, limits) if np.isfinite(limits.damage) else None
    if wanted is None:
        wanted = _least_damage(table, limits)
    if wanted is None or not table.totals(wanted).within(limits):
        return None
    return table.choice(wanted)


def frontier(options: Mapping[str, Sequence[Option]], n: int = 48) -> list[Totals]:
    """The best choices from the smallest file to the largest, for a picture."""
    table, found = _Table(options), list[Totals]()
    for price in np.geomspace(1e-16, 1e-4, 8 * n):
        now = table.totals(table.best(price, 0.0))
        if not found or now.n_bytes < found[-1].n_bytes * 0.995:
            found.append(now)
    return found[::-1]


class _Table:
    """The options as arrays (tensors, most options), missing ones infinitely bad. A choice is an index a tensor."""

    def __init__(self, options: Mapping[str, Sequence[Option]]) -> None:
        self._options = options
        shape = len(options), max(map(len, options.values()))
        self.damage, self.n_bytes, self.seconds = np.full(shape, np.inf), np.full(shape, _NEVER), np.zeros(shape)
        for i, row in enumerate(options.values()):
            for j, option in enumerate(row):
                self.n_bytes[i, j], self.damage[i, j], self.seconds[i, j] = (
                    option.n_bytes, option.damage, option.seconds,
                )  # fmt: skip

    def best(self, byte_price: float, second_price: float) -> NDArray[np.intp]:
        cost = self.damage + byte_price * self.n_bytes + second_price * self.seconds
        chosen: NDArray[np.intp] = cost.argmin(axis=1)
        return chosen

    def totals(self, chosen: NDArray[np.intp]) -> Totals:
        at = np.arange(len(chosen)), chosen
        return Totals(*(float(values[at].sum()) for values in (self.n_bytes, self.damage, self.seconds)))

    def choice(self, chosen: NDArray[np.intp]) -> dict[str, Option]:
        return {name: row[j] for (name, row), j in zip(self._options.items(), chosen, strict=True)}


def _least_damage(table: _Table, limits: Limits) -> NDArray[np.intp] | None:
    room = Limits(limits.n_bytes, np.inf, limits.seconds)

    def cheapest(second_price: float) -> NDArray[np.intp] | None:
        """The least damage within the bytes, at a price for seconds."""
        return _bisect(lambda price: table.best(price, second_price), table, Limits(room.n_bytes))

    chosen = _bisect(cheapest, table, room)
    return None if chosen is None else _fill(table, chosen, room)


def _fewest_bytes(table: _Table, limits: Limits) -> NDArray[np.intp] | None:
    """Like the least damage within a size, for the smallest size at which that is little enough."""
    low = float(table.n_bytes.min(axis=1).sum())
    high = min(limits.n_bytes, float(np.where(table.n_bytes == _NEVER, 0, table.n_bytes).max(axis=1).sum()))
    best = _least_damage(table, Limits(high, np.inf, limits.seconds))
    if best is None or not table.totals(best).within(limits):
        return None
    for _ in range(_SIZES):
        middle = (low + high) / 2
        found = _least_damage(table, Limits(middle, np.inf, limits.seconds))
        if found is not None and table.totals(found).within(limits):
            best, high = found, middle
        else:
            low = middle
    return best


def _bisect(choose: Priced, table: _Table, limits: Limits) -> NDArray[np.intp] | None:
    """The choice at the lowest price that is within the limits; None where none is."""
    at_zero = choose(0.0)
    if at_zero is not None and table.totals(at_zero).within(limits):
        return at_zero
    low, high = -40.0, float(np.log(_DEAREST))
    best = choose(np.exp(high))
    if best is None or not table.totals(best).within(limits):
        return None
    for _ in range(_STEPS):
        middle = (low + high) / 2
        found = choose(np.exp(middle))
        if found is not None and table.totals(found).within(limits):
            best, high = found, middle
        else:
            low = middle
    return best


def _fill(table: _Table, chosen: NDArray[np.intp], limits: Limits) -> NDArray[np.intp]:
    """Take the change that saves most damage per byte, as long as one fits what is left."""
    chosen = chosen.copy()
    at = np.arange(len(chosen))
    while True:
        now = table.totals(chosen)
        gain = table.damage[at, chosen][:, None] - table.damage
        more = table.n_bytes - table.n_bytes[at, chosen][:, None]
        later = table.seconds - table.seconds[at, chosen][:, None]
        fits = (gain > 0) & (now.n_bytes + more <= limits.n_bytes) & (now.seconds + later <= limits.seconds)
        if not fits.any():
            return chosen
        worth = np.where(fits, gain / np.maximum(more, 1), -1.0)
        i, j = np.unravel_index(worth.argmax(), worth.shape)
        chosen[i] = j

"""From a budget to types: what each choice would cost in bytes, quality and time, and the best within the limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp, log
from typing import Any

import numpy as np

from converters.budget.allocate import Limits, Option, allocate, frontier, totals
from converters.budget.sensitivity import Damage
from converters.quantize.types import FILE_TYPES, FileType, block_size, tensor_bytes
from converters.writer import padded
from edgellm.config import total_memory
from edgellm.errors import BudgetError

# every grid that rounding errors can be compensated in, and F16 for budgets that leave all the room
CANDIDATES = (
    "Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q4_0", "IQ4_NL", "Q4_1", "Q5_K", "Q5_0", "Q5_1", "Q6_K", "Q8_0", "F16",
)  # fmt: skip

AUTO = "auto"
_APART = 0.05  # of two choices' logarithms, for a power to be told from them
_POWERS = 0.3, 3.0
_NO_BETTER = 1.05  # times the least divergence: larger files aren't worth drawing
_AUTO_KLD = 0.02  # some 93 of 100 next words stay the same; more bytes than that takes are hardly noticed


@dataclass(frozen=True)
class Budget:
    """At most max_size bytes of file and a KL divergence of max_kld nats, at least min_speed tokens a second.

    is_soft: where max_kld can't be met within the others, the nearest will do.
    """

    max_size: int | None = None
    max_kld: float | None = None
    min_speed: float | None = None
    is_soft: bool = False

    def __post_init__(self) -> None:
        for name, value in (("max_size", self.max_size), ("max_kld", self.max_kld), ("min_speed", self.min_speed)):
            if value is not None and not (value > 0 and np.isfinite(value)):
                raise ValueError(f"{name} is {value}; it must be more than 0")

    def __bool__(self) -> bool:
        return any(value is not None for value in (self.max_size, self.max_kld, self.min_speed))

    def words(self) -> str:
        """For people: what was asked for."""
        return ", ".join(
            text
            for text, value in (
                (f"at most {self.max_size or 0:,} bytes", self.max_size),
                (f"a KL divergence of at most {self.max_kld}{' if it fits' if self.is_soft else ''}", self.max_kld),
                (f"at least {self.min_speed} tokens per second", self.min_speed),
            )
            if value is not None
        )


def budget_of(quant: str | None, max_size: int | None, max_kld: float | None, min_speed: float | None) -> Budget:
    """The budget that was asked for, false if none was. ValueError for a recipe besides a budget."""
    is_auto = quant is not None and quant.lower() == AUTO
    budget = Budget(max_size, max_kld, min_speed)
    if budget and quant is not None and not is_auto:
        raise ValueError(f"a budget chooses the types itself: leave out the quant {quant}, or the budget")
    if not is_auto:
        return budget
    room = total_memory() // 2  # the rest is for the conversation's KV cache, the system and other programs
    n_bytes = min(room, max_size or room)
    return replace(budget, max_size=n_bytes, max_kld=max_kld or _AUTO_KLD, is_soft=max_kld is None)


@dataclass(frozen=True)
class Prospect:
    """What is known before anything is quantized.

    options: of each tensor that may be quantized. groups: group → its tensors. other_bytes: of the file besides these
    tensors. floor: KL divergence that stays whatever the weights, from llama.cpp's quantized activations. scale, power:
    what measuring has shown the damage to come to, floor + scale × damage ** power. overhead: seconds of a decoded
    token besides products.
    """

    options: Mapping[str, Sequence[Option]]
    groups: Mapping[str, Sequence[str]]
    other_bytes: int
    floor: float
    scale: float = 1.0
    power: float = 1.0
    overhead: float | None = None

    def kld(self, damage: float) -> float:
        """What is expected of a choice with so much damage."""
        return self.floor + self.scale * float(damage**self.power)

    def limits(self, budget: Budget) -> Limits:
        """The budget as limits on the options' sums."""
        n_bytes, damage, seconds = np.inf, np.inf, np.inf
        if budget.max_size is not None:
            n_bytes = budget.max_size - self.other_bytes
        if budget.max_kld is not None:
            damage = (max(0.0, budget.max_kld - self.floor) / self.scale) ** (1 / self.power)
        if budget.min_speed is not None:
            seconds = 1 / budget.min_speed - (self.overhead or 0.0)
        return Limits(n_bytes, damage, seconds)

    def corrected(self, seen: Sequence[tuple[float, float]]) -> Prospect:
        """Such that it would have foretold what was measured: (damage, KL divergence), the last two."""
        points = [(log(d), log(max(kld - self.floor, 1e-3 * kld))) for d, kld in seen if d > 0 and kld > 0]
        if not points:
            return self
        (x, y), power = points[-1], 1.0
        if len(points) > 1 and abs(x - points[-2][0]) > _APART:
            power = float(np.clip((y - points[-2][1]) / (x - points[-2][0]), *_POWERS))
        return replace(self, scale=exp(y - power * x), power=power)


def choose(prospect: Prospect, budget: Budget, aim: float = 1.0) -> dict[str, Option]:
    """The best choice within the budget. BudgetError, which names the nearest that can be had.

    aim: share of the budget's divergence to stay below, for what isn't foreseen.
    """
    within = replace(budget, max_kld=aim * budget.max_kld) if budget.max_kld is not None else budget
    found = allocate(prospect.options, prospect.limits(within)) or allocate(prospect.options, prospect.limits(budget))
    if found is None and budget.is_soft:
        found = allocate(prospect.options, prospect.limits(replace(budget, max_kld=None)))
    if found is None:
        raise BudgetError(_nearest(prospect, budget))
    return found


def _nearest(prospect: Prospect, budget: Budget) -> str:
    """Each limit by itself first, then the quality that the others leave."""
    smallest = prospect.other_bytes + sum(min(o.n_bytes for o in row) for row in prospect.options.values())
    if budget.max_size is not None and smallest > budget.max_size:
        return f"{budget.words()} is out of reach: the smallest file of this model has {smallest:,} bytes"
    if budget.min_speed is not None:
        fastest = (prospect.overhead or 0.0) + sum(min(o.seconds for o in row) for row in prospect.options.values())
        if 1 / fastest < budget.min_speed:
            return (
                f"{budget.words()} is out of reach: the fastest file reaches {1 / fastest:.1f} tokens per second here"
            )
    best = allocate(prospect.options, prospect.limits(replace(budget, max_kld=None)))
    if best is None:
        return f"{budget.words()} are out of reach together: allow more bytes or a lower speed"
    sums = totals(best)
    return (
        f"{budget.words()} is out of reach: the nearest is a KL divergence of about {prospect.kld(sums.damage):.4f} "
        f"at {int(sums.n_bytes) + prospect.other_bytes:,} bytes"
    )


def candidates_for(shape: tuple[int, ...]) -> list[str]:
    """The types a tensor of this shape can have."""
    return [name for name in CANDIDATES if shape[-1] % block_size(name) == 0]


def options_of(
    shape: tuple[int, ...], errors: Mapping[str, float], damage: Damage, seconds: Mapping[str, float]
) -> list[Option]:
    """A tensor's options. errors: type → expected error."""
    return [
        Option(name, padded(tensor_bytes(shape, name)), damage.of(error), seconds.get(name, 0.0))
        for name, error in errors.items()
    ]


def file_type_of(choice: Mapping[str, Option]) -> FileType:
    """The recipe a mixed file is filed under: that of the type most bytes are in."""
    n_bytes: dict[str, int] = {}
    for option in choice.values():
        n_bytes[option.type_name] = n_bytes.get(option.type_name, 0) + option.n_bytes
    base = max(n_bytes, key=lambda name: n_bytes[name])
    known = next(file_type for file_type in FILE_TYPES.values() if file_type.base == base)
    return FileType(f"mixed, mostly {base}", known.number, base)


def explained(prospect: Prospect, choice: Mapping[str, Option], n: int = 5) -> list[str]:
    """Where the bytes above the smallest types went, the largest shares first, and what they save."""
    rows, total = [], totals(choice).damage
    for group, names in prospect.groups.items():
        smallest = [min(prospect.options[name], key=lambda option: option.n_bytes) for name in names]
        more = sum(choice[name].n_bytes - least.n_bytes for name, least in zip(names, smallest, strict=True))
        saved = sum(least.damage - choice[name].damage for name, least in zip(names, smallest, strict=True))
        rows.append(
            (
                more,
                saved * prospect.kld(total) / total if total else 0.0,
                group,
                sorted({choice[name].type_name for name in names}),
            )
        )
    all_saved = sum(max(0.0, saved) for _, saved, _, _ in rows) or 1.0
    return [
        f"{_amount(more)} went to {group} ({', '.join(types)}) because that saves {saved:.4f} of KL divergence, "
        f"{100 * saved / all_saved:.0f} % of all that bytes save"
        for more, saved, group, types in sorted(rows, key=lambda row: -row[0])[:n]
        if more > 0
    ]


def _amount(n_bytes: float) -> str:
    return f"{n_bytes / 1e6:.1f} MB" if n_bytes >= 1e5 else f"{n_bytes / 1e3:.1f} kB"


def curve(prospect: Prospect) -> list[dict[str, Any]]:
    """Expected bytes and divergence of the best choices of every size that more bytes improve, for a chart."""
    points = [
        (int(sums.n_bytes) + prospect.other_bytes, prospect.kld(sums.damage)) for sums in frontier(prospect.options)
    ]
    least = min(kld for _, kld in points)
    n = next((k for k, (_, kld) in enumerate(points) if kld <= _NO_BETTER * least), len(points))
    return [{"n_bytes": n_bytes, "kld": kld} for n_bytes, kld in points[: n + 1]]

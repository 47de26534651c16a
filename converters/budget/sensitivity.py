"""How much KL divergence an error in each group of tensors makes: a few real measurements.

A group is one kind of tensor (attn_v, ffn_down, …) at one depth. Its weights are rounded coarsely, all others left as
they are, and the model's answers compared with the original's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from math import log
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from converters.quantize.recipes import layer_of
from edgellm.gguf_header import TensorInfo, read_header, vouched
from edgellm.measure.divergence import Rows, kl_divergence
from edgellm.measure.scoring import OnProgress, Sample, Scorer, in_slabs

_DEPTHS = (0.1, 1 / 3, 2 / 3, 0.9)  # where one depth ends and the next begins, of all blocks
_POWERS = 0.5, 2.0
_APART = 0.7  # times the error: two that are nearer tell no power
_REFERENCE_BYTES = 400_000_000  # of the original's log-probabilities in memory

Rounded = Callable[[str], NDArray[np.float32]]  # a tensor's name → its weights after coarse rounding


def groups_of(names: Sequence[str], n_blocks: int) -> dict[str, list[str]]:
    """Group → its tensors. A tensor outside the blocks is a group of its own."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(_group(name, n_blocks), []).append(name)
    return found


def kind_of(name: str) -> str:
    """attn_v, ffn_down, …: a tensor's name without its block."""
    return (name if layer_of(name) < 0 else name.split(".", 2)[2]).removesuffix(".weight")


def kinds_of(names: Iterable[str]) -> dict[str, list[str]]:
    """Kind → its tensors of all depths."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(kind_of(name), []).append(name)
    return found


def _group(name: str, n_blocks: int) -> str:
    i, kind = layer_of(name), kind_of(name)
    if i < 0:
        return kind
    edges = [0, *(round(share * n_blocks) for share in _DEPTHS), n_blocks]
    k = next(k for k in range(len(edges) - 1) if edges[k] <= i < edges[k + 1])
    last = edges[k + 1] - 1
    return f"{kind} of block {i}" if edges[k] == last else f"{kind} of blocks {edges[k]}–{last}"


class Bench:
    """A scratch copy of the unquantized model, in F16 or F32, in which weights can be changed for a while."""

    def __init__(self, path: Path, samples: Sequence[Sample]) -> None:
        self._path = path
        with vouched(path):
            self._infos: Mapping[str, TensorInfo] = read_header(path).tensors
        n_vocab = self._infos["token_embd.weight"].shape[0]
        n_rows = _REFERENCE_BYTES // (4 * n_vocab)
        n = next((n for n in range(len(samples)) if sum(len(s.positions) for s in samples[: n + 1]) > n_rows), None)
        self._samples = samples[: max(1, n)] if n is not None else samples
        self._reference = list(self._log_probs())

    def divergence(self, names: Sequence[str], rounded: Rounded) -> float:
        """Mean KL divergence from the original with these tensors replaced."""
        with self._replaced(names, rounded):
            pairs = zip(self._reference, self._log_probs(), strict=True)
            found = [kld for reference, rows in pairs for kld in in_slabs(kl_divergence, reference, rows)]
        return float(np.concatenate(found).mean())

    def _log_probs(self) -> Iterator[Rows]:
        n_ctx = max(len(sample.tokens) for sample in self._samples)
        with vouched(self._path), closing(Scorer(self._path, n_ctx)) as scorer:
            for sample in self._samples:
                for rows in scorer.log_probs(sample):
                    yield rows.copy()

    @contextmanager
    def _replaced(self, names: Sequence[str], rounded: Rounded) -> Iterator[None]:
        stored = np.memmap(self._path, np.uint8, "r+")
        before: dict[str, NDArray[np.uint8]] = {}
        try:
            for name in names:
                info = self._infos[name]
                place = stored[info.offset : info.offset + info.n_bytes]
                before[name] = np.array(place)
                dtype = {"F32": np.float32, "F16": np.float16}[info.type_name]
                place[:] = np.ascontiguousarray(rounded(name).astype(dtype)).reshape(-1).view(np.uint8)
            stored.flush()
            yield
        finally:
            for name, data in before.items():
                info = self._infos[name]
                stored[info.offset : info.offset + info.n_bytes] = data
            stored.flush()


@dataclass(frozen=True)
class Round:
    """groups: of tensors, each measured alone; rounded: what takes their place meanwhile."""

    groups: Mapping[str, Sequence[str]]
    rounded: Rounded


def measured(bench: Bench, rounds: Sequence[Round], on_progress: OnProgress | None = None) -> list[dict[str, float]]:
    """For each round the divergence that each of its groups makes alone."""
    found: list[dict[str, float]] = []
    n_done, n_all = 0, sum(len(one.groups) for one in rounds)
    for one in rounds:
        found.append({})
        for group, names in one.groups.items():
            if on_progress:
                on_progress("measuring what matters", n_done, n_all)
            found[-1][group] = bench.divergence(names, one.rounded)
            n_done += 1
    return found


@dataclass(frozen=True)
class Damage:
    """The KL divergence that an error of one tensor makes: rate for each unit of it at the error `seen`, and from there
    on with the error to the power.
    """

    rate: float
    seen: float
    power: float = 1.0

    def of(self, error: float) -> float:
        """In nats."""
        if error <= 0 or self.seen <= 0:
            return 0.0
        return self.rate * self.seen * float((error / self.seen) ** self.power)


def power_between(
    damage: Mapping[str, Damage], names: Sequence[str], errors: Mapping[str, float], divergence: float
) -> float:
    """The power that explains what these tensors did together at other errors than those `damage` was seen at."""
    before = sum(damage[name].rate * damage[name].seen for name in names)
    linear = sum(damage[name].rate * errors[name] for name in names)
    if min(before, linear, divergence) <= 0 or linear > _APART * before:
        return 1.0
    return min(max(log(divergence / before) / log(linear / before), _POWERS[0]), _POWERS[1])

"""How fast a model will write in some mix of tensor types, before it is converted: what `--min-speed` plans with.

A token's time is the sum of its products, each (type, shape) timed once on this machine, and an overhead that doesn't
depend on the types (attention, norms, sampling, scheduling), which one file of the model tells. On the CPU, after few
tokens, one at a time; nothing here knows about GPUs, deep contexts or batches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from pathlib import Path

from edgellm.config import physical_cpu_count
from edgellm.gguf_header import GGUFHeader, check_loadable
from edgellm.measure.speed import decode_seconds_per_token
from edgellm.native.kernels import seconds_per_product

Shape = tuple[int, ...]
Tensors = Mapping[str, tuple[str, Shape]]  # name → type name, shape (outermost first)
Timing = Callable[..., float]  # (type name, (rows, columns), *, n_threads, repack) → seconds

_HEADS, _TIED_HEAD = ("output.weight",), "token_embd.weight"
_OUTSIDE_BLOCKS = ("per_layer_model_proj.weight",)
_NO_PRODUCTS = ("norm.weight", "conv1d.weight", "conv.weight")  # matrices of blocks that nothing is multiplied with


def products_of(tensors: Tensors, *, n_expert_used: int = 1) -> Counter[tuple[str, Shape]]:
    """How often decoding one token multiplies with a matrix of each (type, (rows, columns)).

    Names are GGUF's. Counted are the blocks' matrices and the head, which is token_embd where there is no output.
    Of the experts' tensors (experts, rows, columns) n_expert_used are used, of other tensors of matrices all.
    """
    heads = _HEADS if any(name in tensors for name in _HEADS) else (_TIED_HEAD,)
    counted: Counter[tuple[str, Shape]] = Counter()
    for name, (type_name, shape) in tensors.items():
        if name in (*heads, *_OUTSIDE_BLOCKS) or _is_blocks_matrix(name, shape):
            times = n_expert_used if name.endswith("_exps.weight") else prod(shape[:-2])
            counted[type_name, shape[-2:]] += times
    return counted


def _is_blocks_matrix(name: str, shape: Shape) -> bool:
    in_block = name.startswith(("blk.", "dec.blk.")) and name.endswith(".weight")
    return in_block and len(shape) > 1 and not name.endswith(_NO_PRODUCTS)


def decode_seconds(
    tensors: Tensors, *, n_expert_used: int = 1, n_threads: int = 0, repack: bool = True, timing: Timing | None = None
) -> float:
    """Seconds that the products of one decoded token take on this machine's CPU; the overhead isn't in it.

    Each (type, shape) is timed once a process, some 0.3 s each. timing: in place of `seconds_per_product`, isn't
    remembered. ValueError: a type or shape that ggml can't multiply with.
    """
    measured = timing or _seconds_per_product
    n_threads = n_threads or physical_cpu_count()
    counted = products_of(tensors, n_expert_used=n_expert_used)
    return sum(
        times * measured(type_name, shape, n_threads=n_threads, repack=repack)
        for (type_name, shape), times in counted.items()
    )


@cache
def _seconds_per_product(type_name: str, shape: Shape, *, n_threads: int, repack: bool) -> float:
    return seconds_per_product(type_name, shape, n_threads=n_threads, repack=repack)


def calibrate_overhead(path: Path, *, n_threads: int = 0, repack: bool = True) -> float:
    """Seconds of a decoded token that aren't products: the file's measured time minus that of its products.

    ModelFileError and its kin where the file can't be run.
    """
    return SpeedModel.of(path, n_threads=n_threads, repack=repack).overhead


@dataclass(frozen=True)
class SpeedModel:
    """Predicts the speed of a model whose tensors have these shapes, for any types. overhead: seconds a token."""

    shapes: Mapping[str, Shape]
    overhead: float
    n_expert_used: int = 1
    n_threads: int = 0
    repack: bool = True
    timing: Timing | None = None

    @classmethod
    def of(cls, path: Path, *, n_threads: int = 0, repack: bool = True) -> SpeedModel:
        """From any quantization of the model: its shapes, and the overhead by decoding with it for some seconds."""
        header = check_loadable(path)
        types = {name: info.type_name for name, info in header.tensors.items()}
        shapes = {name: info.shape for name, info in header.tensors.items()}
        free = cls(shapes, 0.0, _n_expert_used(header), n_threads, repack)
        before = decode_seconds_per_token(path, n_threads=n_threads, repack=repack)
        products = free.seconds_per_token(types)
        after = decode_seconds_per_token(path, n_threads=n_threads, repack=repack)
        return replace(free, overhead=max(0.0, min(before, after) - products))  # others only make it slower

    def seconds_per_token(self, types: Mapping[str, str]) -> float:
        """types: tensor name → type name, of every tensor that has a shape here."""
        tensors = {name: (types[name], shape) for name, shape in self.shapes.items()}
        return self.overhead + decode_seconds(
            tensors,
            n_expert_used=self.n_expert_used,
            n_threads=self.n_threads,
            repack=self.repack,
            timing=self.timing,
        )

    def tokens_per_second(self, types: Mapping[str, str]) -> float:
        """Of decoding, at the beginning of a context. See `seconds_per_token`."""
        return 1 / self.seconds_per_token(types)


def _n_expert_used(header: GGUFHeader) -> int:
    value = header.metadata.get(f"{header.architecture}.expert_used_count", 0)
    return max(value, default=1) if isinstance(value, list) else int(value) or 1

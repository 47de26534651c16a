"""VeRA's shared random projections: stored in the adapter, or made again from their seed."""

from __future__ import annotations

from functools import lru_cache
from math import sqrt

import numpy as np

from converters.adapters.read import Adapter
from converters.architectures.spec import Array
from edgellm.errors import AdapterError

Projections = tuple[Array, Array]  # A (r, largest number of inputs), B (largest number of outputs, r)


def projections(adapter: Adapter) -> Projections:
    """A and B; AdapterError where they were neither stored nor can be made again."""
    if "vera_A" in adapter.shared and "vera_B" in adapter.shared:
        return adapter.shared["vera_A"].read(), adapter.shared["vera_B"].read()
    return _regenerated(*_seed_and_shape(adapter))


def needed_inputs(adapter: Adapter, n_inputs: int) -> Adapter:
    """The adapter with the largest number of inputs among its layers, which only the base tells, written down."""
    return Adapter(
        adapter.path, {**adapter.config, "vera_n_inputs": n_inputs}, adapter.modules, adapter.shared, adapter.weight
    )


def _seed_and_shape(adapter: Adapter) -> tuple[int, int, int, int]:
    parts = [parts for parts in adapter.modules.values() if "vera_lambda_b" in parts]
    n_outputs = max(part["vera_lambda_b"].shape[0] for part in parts)
    rank = max(part["vera_lambda_d"].shape[0] for part in parts)
    seed, n_inputs = adapter.config.get("projection_prng_key"), adapter.config.get("vera_n_inputs")
    if type(seed) is not int or type(n_inputs) is not int:
        raise AdapterError(f"{adapter.path} has neither VeRA's projections nor the seed (projection_prng_key) of them")
    return seed, rank, n_inputs, n_outputs


@lru_cache(maxsize=1)
def _regenerated(seed: int, rank: int, n_inputs: int, n_outputs: int) -> Projections:
    """As PEFT draws them: A, then B, uniform with Kaiming's bound √(6/fan-in), from one torch generator."""
    try:
        import torch
    except ImportError as exc:
        raise AdapterError(
            "this VeRA adapter was saved without its projections, and making them again takes torch; "
            'pip install "edgellm[torch]"'
        ) from exc
    generator = torch.Generator(device="cpu").manual_seed(seed)

    def draw(rows: int, columns: int) -> Array:
        bound = sqrt(3.0) * (sqrt(2.0) / sqrt(columns))
        values: Array = torch.empty((rows, columns)).uniform_(-bound, bound, generator=generator).numpy()
        return values.astype(np.float32, copy=False)

    return draw(rank, n_inputs), draw(n_outputs, rank)

"""What is found out about a model before its bytes are handed out: expected errors, what they do, speeds, the floor."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from converters.budget.allocate import Option
from converters.budget.choose import Prospect, candidates_for, options_of
from converters.budget.errors import expected_errors, grams_of, importance_of, matrices, plain_error
from converters.budget.sensitivity import Bench, groups_of, measured
from converters.original import Original, scratch
from converters.plan import Plan, PlannedTensor
from converters.prepare import Inputs, metadata_of, plan_of
from converters.quantize.compensate import DAMPING, HEAD_DAMPING, unpacked
from converters.quantize.gram import Gram, collect_gram
from converters.quantize.grids import Array
from converters.quantize.recipes import may_be_quantized
from converters.quantize.types import TYPE_IDS, block_size
from converters.slices import block_count
from converters.writer import header_bytes, padded
from edgellm.gguf_header import read_header
from edgellm.measure.evaluate import evaluate
from edgellm.measure.kernels import SpeedModel, decode_seconds
from edgellm.measure.scoring import OnProgress, Sample
from edgellm.native.ggml import quantize_rows

_COARSE = "Q4_0"  # what a group is rounded to when it is measured
_FINE = "Q8_0"  # so fine that what is left is the floor
_N_GRAM = 16  # samples
_N_BENCH = 4

Pins = Sequence[tuple[re.Pattern[str], str]]


@dataclass(frozen=True)
class Place:
    """Where and with what the work is done. folder: for scratch files, empty. more_metadata: what the file will hold
    besides the source's own.
    """

    inputs: Inputs
    original: Original
    folder: Path
    memory: int
    more_metadata: Mapping[str, Any]
    n_threads: int = 0
    on_progress: OnProgress | None = None


def look_ahead(
    place: Place, planned: Plan, pins: Pins, training: Sequence[Sample], tuning: Sequence[Sample], with_speed: bool
) -> Prospect:
    """Collect, measure, and work out every tensor's options. planned: any recipe's plan of the source."""
    targets = {tensor.name: tensor for tensor in planned.tensors if _is_open(tensor)}
    sizes = dict(planned.sizes)
    gram = collect_gram(
        place.original.path,
        training[:_N_GRAM],
        place.folder / "gram",
        memory=place.memory,
        with_head=True,
        n_threads=place.n_threads,
        on_progress=place.on_progress,
    )
    groups = groups_of(list(targets), block_count(read_header(place.original.path)))
    sensitivity = _sensitivities(place, targets, groups, gram, sizes, tuning)
    errors = {
        name: expected_errors(
            matrices(tensor, sizes),
            grams_of(gram, name),
            candidates_for(tensor.shape, _pin(name, pins)),
            HEAD_DAMPING if name == "token_embd.weight" else DAMPING,
            place.n_threads,
        )
        for name, tensor in targets.items()
    }
    seconds = {
        name: _seconds(tensor, planned, place.n_threads) if with_speed else {} for name, tensor in targets.items()
    }
    options = {
        name: options_of(tensor.shape, errors[name], sensitivity[name], seconds[name])
        for name, tensor in targets.items()
    }
    return Prospect(
        options,
        groups,
        _other_bytes(place, planned, targets),
        _floor(place, options, tuning),
        overhead=_overhead(place, planned, targets) if with_speed else None,
    )


def _is_open(tensor: PlannedTensor) -> bool:
    """Whether a budget may choose the type."""
    is_matrix = tensor.computed is None and may_be_quantized(tensor.name, tensor.shape)
    return is_matrix and tensor.type_name != "MXFP4" and tensor.shape[-1] % block_size(_COARSE) == 0


def _pin(name: str, pins: Pins) -> str | None:
    return next((type_name for pattern, type_name in pins if pattern.search(name)), None)


def _sensitivities(
    place: Place,
    targets: Mapping[str, PlannedTensor],
    groups: Mapping[str, Sequence[str]],
    gram: Gram,
    sizes: dict[str, int],
    tuning: Sequence[Sample],
) -> dict[str, float]:
    """Of each tensor: the KL divergence its group makes for an error of 1."""
    errors: dict[str, float] = {}

    def rounded(name: str) -> Array:
        weights, grams = matrices(targets[name], sizes), grams_of(gram, name)
        coarse = np.stack([_coarse(w, importance_of(grams, e, w.shape[1])) for e, w in enumerate(weights)])
        errors[name] = plain_error(weights, coarse, grams)
        return coarse

    floats = plan_of(place.inputs, "F16")
    with scratch(place.inputs, floats, place.folder / "bench", place.n_threads) as path:
        klds = measured(Bench(path, tuning[:_N_BENCH]), groups, rounded, place.on_progress)
    found = {}
    for group, names in groups.items():
        total = sum(errors[name] for name in names)
        found.update(dict.fromkeys(names, klds[group] / total if total > 0 else 0.0))
    return found


def _coarse(weights: Array, importance: Array) -> Array:
    packed = quantize_rows(weights, TYPE_IDS[_COARSE], importance=importance)
    return unpacked(_COARSE, packed, weights.shape[1])


def _seconds(tensor: PlannedTensor, planned: Plan, n_threads: int) -> dict[str, float]:
    """Type → seconds that a token's decoding spends with this tensor."""
    if tensor.name == "token_embd.weight" and any(t.name == "output.weight" for t in planned.tensors):
        return {}  # one row of it is looked up
    used = int(planned.metadata.get(f"{planned.architecture}.expert_used_count", 1) or 1)
    return {
        name: decode_seconds({tensor.name: (name, tensor.shape)}, n_expert_used=used, n_threads=n_threads)
        for name in candidates_for(tensor.shape)
    }


def _overhead(place: Place, planned: Plan, targets: Mapping[str, PlannedTensor]) -> float:
    """Of a decoded token, besides products with the targets."""
    model = SpeedModel.of(place.original.path, n_threads=place.n_threads)
    others = {t.name: (t.type_name, t.shape) for t in planned.tensors if t.name not in targets}
    products = {name: entry for name, entry in others.items() if name != "token_embd.weight"}
    return model.overhead + decode_seconds(products, n_expert_used=model.n_expert_used, n_threads=place.n_threads)


def _other_bytes(place: Place, planned: Plan, targets: Mapping[str, PlannedTensor]) -> int:
    metadata = {**metadata_of(place.inputs, planned)[0], **place.more_metadata}
    others = sum(padded(tensor.n_bytes) for tensor in planned.tensors if tensor.name not in targets)
    return padded(len(header_bytes(planned.architecture, metadata, planned.tensors))) + others


def _floor(place: Place, options: Mapping[str, Sequence[Option]], tuning: Sequence[Sample]) -> float:
    """The divergence of the model in the finest type, less what rounding its weights is expected to make."""
    fine = plan_of(place.inputs, _FINE)
    with scratch(place.inputs, fine, place.folder / "floor", place.n_threads) as path:
        found = evaluate(path, tuning[:_N_BENCH], reference=place.original.path, keep=place.folder / "kept")
    assert found.divergence is not None
    expected = sum(o.damage for row in options.values() for o in row if o.type_name == _FINE)
    return max(0.0, found.divergence.kld_mean.value - expected)

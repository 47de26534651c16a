"""What is found out about a model before its bytes are handed out: expected errors, what they do, speeds, the floor."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from converters.budget.choose import Prospect, candidates_for, options_of
from converters.budget.errors import expected_errors, grams_of, importance_of, matrices, plain_error, refinement
from converters.budget.sensitivity import Bench, Damage, Round, groups_of, kinds_of, measured, power_between
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
from edgellm.errors import CheckpointError
from edgellm.gguf_header import read_header
from edgellm.measure.evaluate import evaluate
from edgellm.measure.kernels import SpeedModel, decode_seconds
from edgellm.measure.scoring import OnProgress, Sample
from edgellm.native.ggml import quantize_rows

_COARSE = "Q4_0"  # what a group is rounded to when it is measured
_MIDDLE = "Q5_1"  # and a kind of tensors, whose errors then are about what compensated ones of coarser types are
_FINE = "Q8_0"  # so fine that what is left is the floor
_N_GRAM = 16  # samples
_N_BENCH = 2
_F16_MAX = 65504.0

Pins = Sequence[tuple[re.Pattern[str], str]]


@dataclass(frozen=True)
class Place:
    """Where and with what the work is done. folder: for scratch files, empty. cache: a file that may have what was
    found out before. more_metadata: what the file will hold besides the source's own.
    """

    inputs: Inputs
    original: Original
    folder: Path
    memory: int
    cache: Path
    more_metadata: Mapping[str, Any]
    n_threads: int = 0
    on_progress: OnProgress | None = None


@dataclass(frozen=True)
class Findings:
    """What measuring found out, the same for every budget. damage: of each tensor, what an error does to the model's
    answers; errors: tensor → type → expected error; floor: see `Prospect`.
    """

    damage: Mapping[str, Damage]
    errors: Mapping[str, Mapping[str, float]]
    floor: float


def look_ahead(
    place: Place, planned: Plan, pins: Pins, training: Sequence[Sample], tuning: Sequence[Sample], with_speed: bool
) -> Prospect:
    """Collect, measure, and work out every tensor's options. planned: any recipe's plan of the source."""
    targets = {tensor.name: tensor for tensor in planned.tensors if _is_open(tensor)}
    groups = groups_of(list(targets), block_count(read_header(place.original.path)))
    found = _known(place, targets)
    if found is None:
        found = _find_out(place, planned, targets, groups, training, tuning)
        _remember(place, found)
    options = {}
    for name, tensor in targets.items():
        errors = found.errors[name]
        if any(pattern.search(name) for pattern, _ in pins):  # a type that is no candidate is finer than those
            errors = {tensor.type_name: errors.get(tensor.type_name, 0.0)}
        seconds = _seconds(tensor, planned, list(errors), place.n_threads) if with_speed else {}
        options[name] = options_of(tensor.shape, errors, found.damage[name], seconds)
    overhead = _overhead(place, planned, targets) if with_speed else None
    return Prospect(options, groups, _other_bytes(place, planned, targets), found.floor, overhead=overhead)


def _known(place: Place, targets: Mapping[str, PlannedTensor]) -> Findings | None:
    """What an earlier conversion of the same model and text found out."""
    try:
        content = json.loads(place.cache.read_text(encoding="utf-8"))
        damage = {name: Damage(**one) for name, one in content.pop("damage").items()}
        found = Findings(damage, **content)
        return found if found.errors.keys() == targets.keys() else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _remember(place: Place, found: Findings) -> None:
    with suppress(OSError):  # a cache that can't be written costs only time
        place.cache.parent.mkdir(parents=True, exist_ok=True)
        partial = place.cache.with_name(f"{place.cache.name}.{os.getpid()}.partial")
        partial.write_text(json.dumps(asdict(found)), encoding="utf-8")
        os.replace(partial, place.cache)


def _find_out(
    place: Place,
    planned: Plan,
    targets: Mapping[str, PlannedTensor],
    groups: Mapping[str, Sequence[str]],
    training: Sequence[Sample],
    tuning: Sequence[Sample],
) -> Findings:
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
    damage = _damage(place, targets, groups, gram, sizes, tuning)
    errors = _expected(targets, gram, sizes, place.n_threads)
    fine = sum(damage[name].of(errors[name][_FINE]) for name in targets)
    return Findings(damage, errors, max(0.0, _kld_of(place, _FINE, tuning) - fine))


def _expected(
    targets: Mapping[str, PlannedTensor], gram: Gram, sizes: dict[str, int], n_threads: int
) -> dict[str, dict[str, float]]:
    """Tensor → type → expected error after compensation."""
    found = {}
    for names in kinds_of(targets).values():
        shares: dict[str, float] | None = None  # of the kind's middle tensor first
        for name in sorted(names, key=lambda name: name != names[len(names) // 2]):
            weights, grams = matrices(targets[name], sizes), grams_of(gram, name)
            type_names = [
                t for t in candidates_for(targets[name].shape) if t != "F16" or np.abs(weights).max() <= _F16_MAX
            ]
            damping = HEAD_DAMPING if name == "token_embd.weight" else DAMPING
            shares = shares or refinement(weights, grams, type_names, damping, n_threads)
            expected = expected_errors(weights, grams, type_names, damping, n_threads)
            found[name] = {t: error * shares.get(t, 1.0) for t, error in expected.items()}
    return {name: found[name] for name in targets}


def _is_open(tensor: PlannedTensor) -> bool:
    """Whether a budget may choose the type."""
    is_matrix = tensor.computed is None and may_be_quantized(tensor.name, tensor.shape)
    return is_matrix and tensor.type_name != "MXFP4" and tensor.shape[-1] % block_size(_COARSE) == 0


def _damage(
    place: Place,
    targets: Mapping[str, PlannedTensor],
    groups: Mapping[str, Sequence[str]],
    gram: Gram,
    sizes: dict[str, int],
    tuning: Sequence[Sample],
) -> dict[str, Damage]:
    """Each group rounded coarsely, and each kind of all depths less coarsely: divergence needn't go with the error."""
    errors: dict[str, dict[str, float]] = {_COARSE: {}, _MIDDLE: {}}

    def rounded(name: str, type_name: str) -> Array:
        weights, grams = matrices(targets[name], sizes), grams_of(gram, name)
        importance = (importance_of(grams, e, weights.shape[2]) for e in range(len(weights)))
        found = np.stack([_rounded(w, type_name, i) for w, i in zip(weights, importance, strict=True)])
        errors[type_name][name] = plain_error(weights, found, grams)
        return found

    kinds = kinds_of(targets)
    rounds = [Round(groups, lambda name: rounded(name, _COARSE)), Round(kinds, lambda name: rounded(name, _MIDDLE))]
    with _unquantized(place) as path:
        by_group, by_kind = measured(Bench(path, tuning[:_N_BENCH]), rounds, place.on_progress)
    found = {}
    for group, names in groups.items():
        total = sum(errors[_COARSE][name] for name in names)
        for name in names:
            found[name] = Damage(by_group[group] / total if total > 0 else 0.0, errors[_COARSE][name])
    for kind, names in kinds.items():
        power = power_between(found, names, errors[_MIDDLE], by_kind[kind])
        found.update({name: replace(found[name], power=power) for name in names})
    return found


@contextmanager
def _unquantized(place: Place) -> Iterator[Path]:
    """A copy of the model whose weights may be changed, in F32 where they are beyond F16's range."""
    with ExitStack() as opened:

        def written(quant: str) -> Path:
            planned = plan_of(place.inputs, quant)
            return opened.enter_context(scratch(place.inputs, planned, place.folder / "bench", place.n_threads))

        try:
            path = written("F16")
        except CheckpointError:
            path = written("F32")
        yield path


def _rounded(weights: Array, type_name: str, importance: Array) -> Array:
    packed = quantize_rows(weights, TYPE_IDS[type_name], importance=importance)
    return unpacked(type_name, packed, weights.shape[1])


def _seconds(tensor: PlannedTensor, planned: Plan, type_names: Sequence[str], n_threads: int) -> dict[str, float]:
    """Type → seconds that a token's decoding spends with this tensor."""
    if tensor.name == "token_embd.weight" and any(t.name == "output.weight" for t in planned.tensors):
        return {}  # one row of it is looked up
    used = int(planned.metadata.get(f"{planned.architecture}.expert_used_count", 1) or 1)
    return {
        name: decode_seconds({tensor.name: (name, tensor.shape)}, n_expert_used=used, n_threads=n_threads)
        for name in type_names
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


def _kld_of(place: Place, quant: str, samples: Sequence[Sample]) -> float:
    """The divergence of a plain conversion by a recipe."""
    with scratch(place.inputs, plan_of(place.inputs, quant), place.folder / quant, place.n_threads) as path:
        found = evaluate(path, samples[:_N_BENCH], reference=place.original.path, keep=place.folder / "kept")
    assert found.divergence is not None
    return found.divergence.kld_mean.value

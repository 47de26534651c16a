"""Adapters as a GGUF of LoRA pairs, which llama.cpp adds to a model at run time.

Scales are folded into the pairs and `adapter.lora.alpha` is 0, which llama.cpp takes for "already scaled": rsLoRA and
per-module alphas come out right, which one alpha for all can't say.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from converters.adapters.gguf_base import as_checkpoint
from converters.adapters.merge import Changes, find_changes
from converters.adapters.methods import Change, Factors
from converters.adapters.pairs import through_ops
from converters.adapters.read import Adapter, read_adapter
from converters.adapters.refuse import check_adapter, check_base, check_finite
from converters.adapters.svd import DEFAULT_RANK, Approximation, approximate
from converters.adapters.targets import Targets, find_targets
from converters.architectures.spec import Array, Weight, blocks, gguf_name, hf_names
from converters.damage import blamed_on
from converters.plan import PlannedTensor
from converters.sources import open_source
from converters.writer import Writer, check_output
from edgellm.errors import AdapterError
from edgellm.gguf_adapter import WITHOUT_LORA
from edgellm.gguf_header import read_header, vouched
from edgellm.measure.divergence import Estimate


@dataclass(frozen=True)
class AdapterReceipt:
    """What `export_adapter` wrote. rank: the largest of any pair. Sizes in bytes.

    approximation: where not all of it is exact. kld: what that costs, see `measure_adapter`; unmeasured: why not known.
    """

    output: str
    architecture: str
    methods: tuple[str, ...]
    n_tensors: int
    rank: int
    output_bytes: int
    approximation: Approximation | None = None
    kld: Estimate | None = None
    unmeasured: str = ""


def export_adapter(
    base: str | Path,
    adapters: Sequence[tuple[str | Path, float]],
    out: str | Path,
    *,
    rank: int = DEFAULT_RANK,
    force: bool = False,
    measure: bool = True,
) -> AdapterReceipt:
    """Write adapters of `base` (a checkpoint folder or a GGUF) as one GGUF LoRA; several become one, exactly.

    What is no low-rank product (DoRA) is cut to `rank`, and the receipt says what that leaves of it and, if `measure`,
    what it costs (KL divergence from the merged model, which takes some time and twice the base's size on disk).
    Raises AdapterError for changes that no product of matrices makes, and what opening the base raises.
    """
    with blamed_on(Path(adapters[0][0]), AdapterError):
        receipt = _export(base, adapters, Path(out), rank, force)
    if receipt.approximation is None or not measure:
        return receipt
    from converters.adapters.measured import measure_adapter

    kld, why_not = measure_adapter(base, adapters, Path(out))
    return replace(receipt, kld=kld, unmeasured=why_not)


def _export(
    base: str | Path, adapters: Sequence[tuple[str | Path, float]], out: Path, rank: int, force: bool
) -> AdapterReceipt:
    source = open_source(base)
    source = as_checkpoint(source) if source.kind == "gguf" else source
    targets = find_targets(source)
    opened = [read_adapter(folder, weight) for folder, weight in adapters]
    for adapter in opened:
        check_adapter(adapter, for_run_time=True)
        check_base(adapter, source)
        check_finite(adapter)
    changes, _, _ = find_changes(targets, opened)
    _refuse_tied(changes, targets, opened)
    methods = tuple(sorted({change.what for several in changes.values() for change in several}))
    changes, approximation = approximate(changes, targets, rank)
    pairs = _gguf_pairs(changes, targets, opened)
    metadata = _metadata(targets, opened)
    tensors = [_planned(name, values) for name, values in pairs]
    check_output(out, sum(tensor.n_bytes for tensor in tensors), force)
    with Writer(out, targets.arch.name, metadata, tensors) as writer:
        for tensor in tensors:
            assert tensor.computed is not None
            writer.write(tensor, [tensor.computed.reshape(-1).view(np.uint8)])
        partial = writer.finish()
        with vouched(partial):
            read_header(partial)
        writer.commit()
    ranks = [values.shape[-2] for name, values in pairs if name.endswith(".lora_a") and "token_embd" not in name]
    return AdapterReceipt(
        output=str(out),
        architecture=targets.arch.name,
        methods=methods,
        n_tensors=len(pairs) // 2,
        rank=max(ranks, default=0),
        output_bytes=out.stat().st_size,
        approximation=approximation,
    )


def _metadata(targets: Targets, adapters: Sequence[Adapter]) -> dict[str, Any]:
    metadata: dict[str, Any] = {
        "general.architecture": targets.arch.name,
        "general.type": "adapter",
        "general.name": " + ".join(adapter.path.resolve().name for adapter in adapters),
        "adapter.type": "lora",
        "adapter.lora.alpha": 0.0,
    }
    invocations = [a.config["alora_invocation_tokens"] for a in adapters if a.config.get("alora_invocation_tokens")]
    if invocations:
        if len(adapters) > 1:
            raise AdapterError("an activated LoRA can't be joined with other adapters; export it alone")
        metadata["adapter.alora.invocation_tokens"] = invocations[0]
    return metadata


def _refuse_tied(changes: Changes, targets: Targets, adapters: Sequence[Adapter]) -> None:
    if targets.tied and (targets.embedding in changes or targets.head in changes):
        raise AdapterError(
            f"{adapters[0].path} changes the embedding or the head of a model whose two are tied: llama.cpp would add "
            "it to both; merge it instead (without --adapter-only)"
        )


def _gguf_pairs(changes: Changes, targets: Targets, adapters: Sequence[Adapter]) -> list[tuple[str, Array]]:
    """(name, values) of every lora_a and lora_b, in the order of the model's tensors."""
    left_over = set(changes)
    pairs: list[tuple[str, Array]] = []
    for weight in targets.arch.weights:
        for i in blocks(weight, targets.config, targets.sizes):
            stored = [targets.get(name) for name in hf_names(weight, i, targets.sizes)]
            if not any(name in changes for name in stored):
                continue
            left_over -= {name for name in stored if name}
            name = gguf_name(weight, i)
            pairs += _pair(name, weight, [changes.get(n or "") for n in stored], targets, adapters)
    if left_over:
        raise AdapterError(f"{adapters[0].path} changes {min(left_over)}, which isn't a tensor of its own at run time")
    return pairs


def _pair(
    name: str,
    weight: Weight,
    changes: list[list[Change] | None],
    targets: Targets,
    adapters: Sequence[Adapter],
) -> Iterable[tuple[str, Array]]:
    if WITHOUT_LORA.fullmatch(name):
        raise AdapterError(
            f"{adapters[0].path} changes {name}, to which llama.cpp adds no adapter at run time; merge it instead "
            "(without --adapter-only)"
        )
    for several in changes:
        for change in several or ():
            if change.factors is None and change.expert_factors is None:
                raise AdapterError(
                    f"{adapters[0].path} has {change.what} for {name}, which isn't a low-rank product and can't be "
                    "added at run time; merge it instead (without --adapter-only)"
                )
    if weight.shape[0] == "n_expert" and len(weight.shape) == 3:
        left, right = _expert_stack(weight, changes, targets)
    else:
        left, right = _joined(change.factors() for change in changes[0] or () if change.factors)
        left, right = through_ops(*_as_stored(left, right, weight), weight.ops, targets.sizes)
    if name == "token_embd.weight":  # llama.cpp looks rows up in a, and multiplies them with b
        return ((f"{name}.lora_a", left), (f"{name}.lora_b", right.T))
    return ((f"{name}.lora_a", right), (f"{name}.lora_b", left))


def _as_stored(left: Array, right: Array, weight: Weight) -> Factors:
    """Methods give outputs first; some families store inputs first."""
    return (right.T, left.T) if any(op.name == "transpose" for op in weight.ops) else (left, right)


def _expert_stack(weight: Weight, changes: list[list[Change] | None], targets: Targets) -> Factors:
    """(experts, rows, r) and (experts, r, columns); an expert nobody changed has zeros."""
    n_expert = targets.sizes["n_expert"]
    found: list[Factors | None] = []
    for e in range(n_expert):
        several = changes[e] if len(changes) > 1 else changes[0]
        made = [_expert_factors(change, e) for change in several or ()]
        pair = _as_stored(*_joined(made), weight) if made else None
        found.append(through_ops(*pair, weight.ops, targets.sizes) if pair else None)
    left, right = next(pair for pair in found if pair is not None)
    rank = max(pair[1].shape[0] for pair in found if pair is not None)
    lefts = np.zeros((n_expert, left.shape[0], rank), np.float32)
    rights = np.zeros((n_expert, rank, right.shape[1]), np.float32)
    for e, pair in enumerate(found):
        if pair is not None:
            lefts[e, :, : pair[0].shape[1]], rights[e, : pair[1].shape[0]] = pair
    return lefts, rights


def _expert_factors(change: Change, e: int) -> Factors:
    if change.expert_factors is not None:
        return change.expert_factors(e)
    assert change.factors is not None
    return change.factors()


def _joined(pairs: Iterable[Factors]) -> Factors:
    """L1·R1 + L2·R2 = [L1 L2]·[R1; R2]."""
    lefts, rights = zip(*pairs, strict=True)
    return np.concatenate(lefts, axis=1), np.concatenate(rights, axis=0)


def _planned(name: str, values: Array) -> PlannedTensor:
    values = np.ascontiguousarray(values, dtype=np.float32)
    return PlannedTensor(name, values.shape, "F32", "F32", values.nbytes, computed=values)

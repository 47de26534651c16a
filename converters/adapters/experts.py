"""LoRA on the experts' parameters (PEFT's `target_parameters`), stored in one tensor each or one by one.

In the model, `gate_up_proj` is (experts, 2·n_ff, n_embd), gate first, and `down_proj` (experts, n_embd, n_ff), or with
the last two swapped; a checkpoint may have every expert's gate, up and down by itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from converters.adapters.methods import Change, Factors, low_rank
from converters.adapters.read import Adapter, Parts
from converters.adapters.scaling import lora_scale
from converters.adapters.targets import Targets, plain_name
from converters.architectures.spec import Array
from edgellm.errors import AdapterError

ExpertFactors = Callable[[int], Factors]
# the order in which model classes declare them: PEFT's innermost wrapper holds the first
_DECLARED = ("gate_up_proj", "up_proj", "input_linear", "weight", "down_proj", "output_linear")
_GGUF = {"gate": "ffn_gate_exps.weight", "up": "ffn_up_exps.weight", "down": "ffn_down_exps.weight"}


def expert_changes(adapter: Adapter, module: str, parts: Parts, targets: Targets) -> list[tuple[str, Change]] | None:
    """(stored tensor, change) for a module whose parameters were targeted by name; None for any other module."""
    path, parameter = _parameter(adapter, module)
    if not parameter or "lora_A" not in parts:
        return None
    if "lora_B" not in parts:
        raise AdapterError(f"{adapter.path} lacks lora_B of {module}; save the adapter again")
    stored = targets.get(f"{path}.{parameter}") or targets.get(f"{path}.{parameter}.weight")
    if stored is not None and len(targets.tensors[stored].shape) == 2:
        a, b = parts["lora_A"], parts["lora_B"]
        scale = np.float32(adapter.weight * lora_scale(adapter, f"{path}.{parameter}", a.shape[0]))
        return [(stored, low_rank("LoRA", (b.shape[0], a.shape[1]), lambda: (scale * b.read(), a.read())))]
    if stored is not None:
        return [(stored, _stacked(adapter, path, parameter, parts, targets, stored))]
    return _one_by_one(adapter, path, parameter, parts, targets)


def _parameter(adapter: Adapter, module: str) -> tuple[str, str]:
    """(path of the module, name of the parameter) that a key with PEFT's nested wrappers stands for."""
    wanted = adapter.config.get("target_parameters") or []
    if not wanted:
        return module, ""
    path = re.sub(r"(\.base_layer)+$", "", module)
    depth = module.count(".base_layer")
    names = {
        str(target).rpartition(".")[2]
        for target in wanted
        if f".{path}".endswith(f".{str(target).rpartition('.')[0]}") or "." not in str(target)
    }
    siblings = [depth for depth in range(len(names) + 1) if path + ".base_layer" * depth in adapter.modules]
    ordered = sorted(names, key=lambda name: (_DECLARED.index(name) if name in _DECLARED else 99, name))
    if len(siblings) != len(ordered):
        return path, ""
    return path, ordered[len(ordered) - 1 - depth]


def _factors(adapter: Adapter, path: str, parameter: str, parts: Parts, n_expert: int) -> ExpertFactors:
    """Of one expert: PEFT orders the experts of A first (expert, rank), of B last (rank, expert)."""
    a, b = parts["lora_A"], parts["lora_B"]
    if a.shape[0] % n_expert or b.shape[1] != a.shape[0]:
        raise AdapterError(f"{adapter.path}: LoRA of {path}.{parameter} doesn't fit the base's {n_expert} experts")
    rank = a.shape[0] // n_expert
    scale = np.float32(adapter.weight * lora_scale(adapter, f"{path}.{parameter}", rank))

    def of(e: int) -> Factors:
        left = b.read().reshape(b.shape[0], rank, n_expert)[:, :, e]
        return np.ascontiguousarray(scale * left), a.read().reshape(n_expert, rank, -1)[e]

    return of


def _stacked(adapter: Adapter, path: str, parameter: str, parts: Parts, targets: Targets, stored: str) -> Change:
    shape = targets.tensors[stored].shape
    weight = targets.spec_of.get(plain_name(stored))
    inputs_first = weight is not None and any(op.name == "transpose" for op in weight.ops)
    factors = _factors(adapter, path, parameter, parts, shape[0])
    n_out, n_in = parts["lora_B"].shape[0], parts["lora_A"].shape[1]

    def apply(weights: Array, base: Array, start: int) -> Array:
        for k in range(len(weights)):
            left, right = factors(start + k)
            weights[k] += (left @ right).T if inputs_first else left @ right
        return weights

    expected = (shape[0], n_in, n_out) if inputs_first else (shape[0], n_out, n_in)
    return Change("LoRA", expected, apply, expert_factors=factors)


def _one_by_one(
    adapter: Adapter, path: str, parameter: str, parts: Parts, targets: Targets
) -> list[tuple[str, Change]]:
    """The same, for a checkpoint that has every expert's matrices by themselves."""
    n_expert = targets.sizes.get("n_expert", 0)
    block = re.search(r"layers\.(\d+)\.", path)
    if not n_expert or block is None:
        raise AdapterError(f"{adapter.path} changes {path}.{parameter}, which {targets.source.path} doesn't have")
    factors = _factors(adapter, path, parameter, parts, n_expert)
    kinds = ["gate", "up"] if parameter == "gate_up_proj" else ["down"]
    changes: list[tuple[str, Change]] = []
    for position, kind in enumerate(kinds):
        weight = next((w for w in targets.arch.weights if w.gguf.endswith(_GGUF[kind]) and "{e}" in w.hf), None)
        if weight is None:
            raise AdapterError(f"{adapter.path} changes {path}.{parameter}, which {targets.source.path} doesn't have")
        n_rows = parts["lora_B"].shape[0] // len(kinds)
        for e in range(n_expert):
            name = targets.find(weight.hf.replace("{i}", block[1]).replace("{e}", str(e)), adapter)
            changes.append((name, _slice(factors, e, position * n_rows, n_rows, parts["lora_A"].shape[1])))
    return changes


def _slice(factors: ExpertFactors, e: int, first: int, n_rows: int, n_in: int) -> Change:
    def of() -> Factors:
        left, right = factors(e)
        return left[first : first + n_rows], right

    return low_rank("LoRA", (n_rows, n_in), of)

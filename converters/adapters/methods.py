"""One formula for each method: what an adapter does to a weight, in float32.

Weights are (outputs, inputs) here, an embedding (vocabulary, features), however the checkpoint stores them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from converters.adapters.read import Adapter, Parts
from converters.adapters.scaling import config_number, lora_scale, lycoris_scale
from converters.architectures.spec import Array
from converters.sources import SourceTensor
from edgellm.errors import AdapterError

Factors = tuple[Array, Array]  # (outputs, r) and (r, inputs), whose product is added
_SLAB_BYTES = 1 << 24
_SMALL_PRODUCT = 500_000  # multiplications


@dataclass(frozen=True)
class Change:
    """What happens to one tensor.

    apply(weights, base, start): `weights` are rows start, start + 1 … as the changes so far left them, and may be
    overwritten; `base` the same rows before any change. shape: what the tensor must have; None = anything.
    factors: the change as a low-rank product, where it is one exactly; expert_factors: that of each expert.
    whole: it needs all rows at once.
    new_shape: where it isn't the old one (a vocabulary that grew). needs_base: `weights` alone don't do.
    replaces: what later changes of the same adapter take for the base.
    """

    what: str
    shape: tuple[int, ...] | None
    apply: Callable[[Array, Array, int], Array]
    factors: Callable[[], Factors] | None = None
    whole: bool = False
    new_shape: tuple[int, ...] | None = None
    needs_base: bool = False
    replaces: bool = False
    expert_factors: Callable[[int], Factors] | None = None


def weight_changes(adapter: Adapter, module: str, parts: Parts, shape: tuple[int, ...]) -> list[Change]:
    """What the parts of a module do to its weight, in order. `shape` is the base's."""
    changes: list[Change] = []
    if "weight" in parts:
        changes.append(_replace(adapter, parts["weight"], shape))
        shape = parts["weight"].shape
    for needed, make in _MAKERS:
        if not any(part in parts for part in needed):
            continue
        lacking = [part for part in needed if part not in parts]
        if lacking:
            raise AdapterError(f"{adapter.path} lacks {lacking[0]} of {module}; save the adapter again")
        changes.append(make(adapter, module, parts, shape))
    if any(part.startswith("lokr_") for part in parts):
        changes.append(_lokr(adapter, module, parts, shape))
    return changes


def bias_changes(adapter: Adapter, module: str, parts: Parts) -> list[Change]:
    """What they do to its bias."""
    changes: list[Change] = []
    if "bias" in parts:
        changes.append(_replace(adapter, parts["bias"], parts["bias"].shape))
    if "lora_B.bias" in parts:
        scale = adapter.weight * lora_scale(adapter, module, parts["lora_B"].shape[1])
        changes.append(Change("LoRA bias", parts["lora_B.bias"].shape, _adder(parts["lora_B.bias"], scale)))
    return changes


def ia3_bias(adapter: Adapter, parts: Parts) -> Change | None:
    """IA³ rescales the outputs of a layer, so its bias as well; in a feed-forward layer it rescales the inputs."""
    learned = parts.get("ia3_l")
    if learned is None or _is_feedforward(learned.shape):
        return None

    def apply(bias: Array, base: Array, start: int) -> Array:
        return bias * _mixed(learned.read().reshape(-1)[start : start + len(bias)], adapter.weight)

    return Change("IA³", (learned.shape[0],), apply)


def low_rank(what: str, shape: tuple[int, ...], factors: Callable[[], Factors]) -> Change:
    """+ L·R."""

    def apply(weights: Array, base: Array, start: int) -> Array:
        left, right = factors()
        return _add_product(weights, left[start : start + len(weights)], right)

    return Change(what, shape, apply, factors)


def _add_product(weights: Array, left: Array, right: Array) -> Array:
    # Products so small that BLAS keeps to one thread: its threads would take the quantizer's cores, and spin.
    step = max(1, _SMALL_PRODUCT // (weights.shape[-1] * right.shape[0]))
    for first in range(0, len(weights), step):
        weights[first : first + step] += left[first : first + step] @ right
    return weights


def _adder(tensor: SourceTensor, scale: float) -> Callable[[Array, Array, int], Array]:
    def apply(weights: Array, base: Array, start: int) -> Array:
        weights += np.float32(scale) * tensor.read().reshape(-1)[start : start + len(weights)]
        return weights

    return apply


def _mixed(factor: Array, weight: float) -> Array:
    """A factor of which only a share is wanted."""
    return factor if weight == 1 else np.float32(1 - weight) + np.float32(weight) * factor


def _replace(adapter: Adapter, tensor: SourceTensor, shape: tuple[int, ...]) -> Change:
    def apply(weights: Array, base: Array, start: int) -> Array:
        values = tensor.read()
        if values.shape != shape:
            return values
        values = values[start : start + len(weights)]
        return values if adapter.weight == 1 else weights + np.float32(adapter.weight) * (values - base)

    resized = tensor.shape != shape and len(tensor.shape) == 2 and tensor.shape[1:] == shape[1:]
    if resized and adapter.weight != 1:
        raise AdapterError(f"{adapter.path} resizes {tensor.name}, which can't be merged in part; give it weight 1")
    needs_base = adapter.weight != 1
    if resized:
        return Change("replaced", shape, apply, whole=True, new_shape=tensor.shape, replaces=True)
    return Change("replaced", tensor.shape, apply, needs_base=needs_base, replaces=True)


def _lora(adapter: Adapter, module: str, parts: Parts, shape: tuple[int, ...]) -> Change:
    """W + s·B·A (Hu et al. 2021); AdaLoRA (Zhang et al. 2023) has singular values between them."""
    a, b = parts["lora_A"], parts["lora_B"]
    rank = a.shape[0]
    what, scale = ("rsLoRA" if adapter.config.get("use_rslora") else "LoRA"), 0.0
    if "lora_E" in parts:
        what, scale = "AdaLoRA", _adalora_scale(adapter, parts, rank)
    elif rank:
        scale = lora_scale(adapter, module, rank)

    def factors() -> Factors:
        right = a.read()
        if "lora_E" in parts:
            right = right * parts["lora_E"].read()
        return np.float32(scale * (1 if "lora_magnitude_vector" in parts else adapter.weight)) * b.read(), right

    expected = (b.shape[0], a.shape[1])
    if b.shape[1] != rank:
        raise AdapterError(f"{adapter.path}: lora_A and lora_B of {module} have ranks {rank} and {b.shape[1]}")
    if "lora_magnitude_vector" not in parts:
        return low_rank(what, expected, factors)
    return _dora(adapter, parts["lora_magnitude_vector"], expected, factors, norm_axis=1)


def _adalora_scale(adapter: Adapter, parts: Parts, rank: int) -> float:
    """α, not divided by the rank, over the rank before pruning (plus PEFT's ε)."""
    alpha = config_number(adapter, "lora_alpha", 8)
    stored = parts.get("ranknum")
    before = float(stored.read().reshape(-1)[0]) if stored is not None else config_number(adapter, "init_r", rank)
    return (alpha if alpha > 0 else before) / (before + 1e-5)


def _embedding_lora(adapter: Adapter, module: str, parts: Parts, shape: tuple[int, ...]) -> Change:
    """The table's own orientation: rows are tokens, and the product is transposed."""
    a, b = parts["lora_embedding_A"], parts["lora_embedding_B"]
    scale = lora_scale(adapter, module, a.shape[0])
    weight = 1 if "lora_magnitude_vector" in parts else adapter.weight

    def factors() -> Factors:
        return np.float32(scale * weight) * np.ascontiguousarray(a.read().T), np.ascontiguousarray(b.read().T)

    expected = (a.shape[1], b.shape[0])
    if "lora_magnitude_vector" not in parts:
        return low_rank("embedding LoRA", expected, factors)
    return _dora(adapter, parts["lora_magnitude_vector"], expected, factors, norm_axis=0)


def _dora(
    adapter: Adapter, magnitude: SourceTensor, shape: tuple[int, ...], factors: Callable[[], Factors], norm_axis: int
) -> Change:
    """m · (W + sBA) / ‖W + sBA‖ per output (Liu et al. 2024); the norm is that of the base with this adapter alone."""
    if int(np.prod(magnitude.shape)) != shape[1 - norm_axis]:
        raise AdapterError(f"{adapter.path}: {magnitude.name} has shape {list(magnitude.shape)}, expected {shape}")

    def apply(weights: Array, base: Array, start: int) -> Array:
        left, right = factors()
        left = left[start : start + len(base)]
        alone = base is weights
        changed = _add_product(base if alone and adapter.weight == 1 else base.copy(), left, right)
        norm = np.sqrt(np.einsum("ij,ij->i" if norm_axis == 1 else "ij,ij->j", changed, changed, dtype=np.float64))
        wanted = magnitude.read().reshape(-1)
        factor: Array = (wanted[start : start + len(base)] if norm_axis == 1 else wanted) / norm.astype(np.float32)
        factor = factor[:, None] if norm_axis == 1 else factor[None, :]
        if adapter.weight == 1:
            total: Array = changed if alone else _add_product(weights, left, right)
            total *= factor
            return total
        partly: Array = weights + np.float32(adapter.weight) * (changed * factor - base)
        return partly

    return Change("DoRA", shape, apply, whole=norm_axis == 0, needs_base=True)


def _loha(adapter: Adapter, module: str, parts: Parts, shape: tuple[int, ...]) -> Change:
    """+ s·(w1a·w1b) ∘ (w2a·w2b) (Hyeon-Woo et al. 2021)."""
    _no_convolution(adapter, module, parts, "hada_t1")
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    scale = np.float32(adapter.weight * lycoris_scale(adapter, module, parts["hada_w1_b"].shape[0]))

    def apply(weights: Array, base: Array, start: int) -> Array:
        left_1, right_1, left_2, right_2 = (parts[name].read() for name in names)
        step = max(1, _SLAB_BYTES // (4 * weights.shape[1]))
        for first in range(0, len(weights), step):
            rows = slice(start + first, min(start + first + step, start + len(weights)))
            delta = left_1[rows] @ right_1
            delta *= left_2[rows] @ right_2
            delta *= scale
            weights[first : first + step] += delta
        return weights

    def factors() -> Factors:
        """The product of two low-rank matrices, element by element, has rank r²: all products of their columns."""
        left_1, right_1, left_2, right_2 = (parts[name].read() for name in names)
        left = (left_1[:, :, None] * left_2[:, None, :]).reshape(len(left_1), -1)
        right = (right_1[:, None, :] * right_2[None, :, :]).reshape(-1, right_1.shape[1])
        return scale * left, right

    expected = (parts["hada_w1_a"].shape[0], parts["hada_w1_b"].shape[1])
    return Change("LoHa", expected, apply, factors)


def _lokr(adapter: Adapter, module: str, parts: Parts, shape: tuple[int, ...]) -> Change:
    """+ s·(w1 ⊗ w2), each factor whole or low-rank (LoKr, Yeh et al. 2023; whole ones: KronA, Edalati et al. 2022)."""
    _no_convolution(adapter, module, parts, "lokr_t2")
    first, second = _lokr_factor(adapter, module, parts, 1), _lokr_factor(adapter, module, parts, 2)
    ranks = [parts[name].shape[0] for name in ("lokr_w1_b", "lokr_w2_b") if name in parts]
    scale = np.float32(adapter.weight * lycoris_scale(adapter, module, ranks[0] if ranks else 8))

    def apply(weights: Array, base: Array, start: int) -> Array:
        (left_1, right_1), (left_2, right_2) = first.read(), second.read()
        w1, w2 = scale * (left_1 @ right_1), left_2 @ right_2
        height = len(w2)
        for i, row in enumerate(w1):  # the i-th band of rows of w1 ⊗ w2
            low, high = max(i * height, start), min((i + 1) * height, start + len(weights))
            if low < high:
                weights[low - start : high - start] += np.kron(row[None, :], w2[low - i * height : high - i * height])
        return weights

    def factors() -> Factors:
        """(L1·R1) ⊗ (L2·R2) = (L1 ⊗ L2)·(R1 ⊗ R2)."""
        (left_1, right_1), (left_2, right_2) = first.read(), second.read()
        return np.kron(scale * left_1, left_2), np.kron(right_1, right_2)

    what = "LoKr" if ranks else "KronA"
    return Change(what, (first.shape[0] * second.shape[0], first.shape[1] * second.shape[1]), apply, factors)


@dataclass(frozen=True)
class _LokrFactor:
    shape: tuple[int, int]
    read: Callable[[], Factors]


def _lokr_factor(adapter: Adapter, module: str, parts: Parts, which: int) -> _LokrFactor:
    """w1 or w2 as a product, with the identity on its shorter side where it is stored whole."""
    whole, a, b = (parts.get(f"lokr_w{which}{end}") for end in ("", "_a", "_b"))
    if whole is not None and len(whole.shape) == 2:
        stored, n = whole, min(whole.shape)

        def read() -> Factors:
            values, identity = stored.read(), np.eye(n, dtype=np.float32)
            return (values, identity) if values.shape[1] == n else (identity, values)

        return _LokrFactor((whole.shape[0], whole.shape[1]), read)
    if a is None or b is None:
        raise AdapterError(f"{adapter.path} lacks lokr_w{which} of {module}; save the adapter again")
    left, right = a, b
    return _LokrFactor((a.shape[0], b.shape[1]), lambda: (left.read(), right.read()))


def _no_convolution(adapter: Adapter, module: str, parts: Parts, name: str) -> None:
    if name in parts:
        raise AdapterError(
            f"{adapter.path}: {module} is a convolution's adapter, which isn't supported; merge with peft"
        )


def _vera(adapter: Adapter, module: str, parts: Parts, shape: tuple[int, ...]) -> Change:
    """+ (λ_b·B)(λ_d·A) with shared random A and B (Kopiczko et al. 2023), of which the first rows and columns count."""
    from converters.adapters.vera import projections

    lambda_b, lambda_d = parts["vera_lambda_b"], parts["vera_lambda_d"]
    n_out, n_in = lambda_b.shape[0], shape[-1]

    def factors() -> Factors:
        a, b = projections(adapter)
        left = np.float32(adapter.weight) * lambda_b.read()[:, None] * b[:n_out]
        return left, lambda_d.read()[:, None] * a[:, :n_in]

    return low_rank("VeRA", (n_out, n_in), factors)


def _ia3(adapter: Adapter, module: str, parts: Parts, shape: tuple[int, ...]) -> Change:
    """W ∘ l, along the outputs, or along the inputs of a feed-forward layer (Liu et al. 2022)."""
    learned = parts["ia3_l"]
    feedforward = _is_feedforward(learned.shape)

    def apply(weights: Array, base: Array, start: int) -> Array:
        factor = _mixed(learned.read(), adapter.weight)
        weights *= factor if feedforward else factor[start : start + len(weights)]
        return weights

    return Change("IA³", (shape[0], learned.shape[1]) if feedforward else (learned.shape[0], shape[1]), apply)


def _is_feedforward(shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and shape[0] == 1


def _tokens(adapter: Adapter, module: str, parts: Parts, shape: tuple[int, ...]) -> Change:
    """Some rows of the embedding replaced."""
    rows = parts["trainable_tokens_delta"]
    ids = token_ids(adapter, module)
    if len(ids) != rows.shape[0] or any(not 0 <= i < shape[0] for i in ids):
        raise AdapterError(
            f"{adapter.path} trained {rows.shape[0]} tokens of {module}, but its config names {len(ids)} ids, "
            f"the largest {max(ids, default=0)}, and the base has {shape[0]} tokens: is it another base?"
        )

    def apply(weights: Array, base: Array, start: int) -> Array:
        for i, values in zip(ids, rows.read(), strict=True):
            if start <= i < start + len(weights):
                weights[i - start] += np.float32(adapter.weight) * (values - weights[i - start])
        return weights

    return Change("trained tokens", (shape[0], rows.shape[1]), apply)


def token_ids(adapter: Adapter, module: str) -> list[int]:
    """Which tokens were trained: a list, or a table of one for each embedding."""
    config: Any = adapter.config.get("trainable_token_indices") or adapter.config.get("token_indices") or []
    if isinstance(config, dict):
        config = next((ids for name, ids in config.items() if module.endswith(name)), [])
    if not isinstance(config, list) or not all(type(i) is int for i in config):
        raise AdapterError(f"{adapter.path}/adapter_config.json doesn't say which tokens of {module} were trained")
    return config


_Maker = Callable[[Adapter, str, Parts, tuple[int, ...]], Change]
# the parts that make up a method → its formula
_MAKERS: tuple[tuple[tuple[str, ...], _Maker], ...] = (
    (("lora_A", "lora_B"), _lora),
    (("lora_embedding_A", "lora_embedding_B"), _embedding_lora),
    (("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), _loha),
    (("vera_lambda_b", "vera_lambda_d"), _vera),
    (("ia3_l",), _ia3),
    (("trainable_tokens_delta",), _tokens),
)

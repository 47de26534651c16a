"""Checkpoints whose weights are already quantized, shown as the ordinary float weights they stand for.

`quantization_config` in config.json names the method; each method's file turns the tensors it stores for a layer into
one `SourceTensor` under the layer's usual name, with its shape known from headers and its values computed on reading.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from converters.sources import SourceTensor
from converters.sources.prequantized import awq, bnb, compressed_tensors, gptq, mxfp4, scaled
from edgellm.errors import CheckpointError

_METHODS = {
    "gptq": gptq.restore,
    "awq": awq.restore,
    "bitsandbytes": bnb.restore,
    "fp8": scaled.restore,
    "fbgemm_fp8": scaled.restore,
    "compressed-tensors": compressed_tensors.restore,
    "mxfp4": mxfp4.restore,
}
# scales of activations and of the KV cache: llama.cpp quantizes those in its own way
_UNUSED = (
    "activation_scale", ".input_scale", ".input_scale_ub", ".input_zero_point", ".output_scale", ".k_scale", ".v_scale",
    ".k_proj.output_scale", ".v_proj.output_scale",
)  # fmt: skip


def restore_weights(
    config: Mapping[str, Any], tensors: Mapping[str, SourceTensor]
) -> tuple[dict[str, SourceTensor], tuple[str, ...]]:
    """The tensors as an unquantized checkpoint would have them, and notes for the receipt.

    A config may still speak of a quantization that was undone when the weights were merged; then nothing changes.
    CheckpointError: an unknown method, or a tensor whose companions are missing or don't fit.
    """
    said = config.get("quantization_config") or config.get("compression_config")
    if not isinstance(said, dict) or not said:
        return dict(tensors), ()
    method = _method(said)
    if method not in _METHODS:
        raise CheckpointError(
            f"the checkpoint is quantized with {method!r}, which isn't supported; supported are "
            f"{', '.join(_METHODS)}; or convert the unquantized model"
        )
    restored = _METHODS[method](tensors, said)
    if not restored:
        return dict(tensors), ()
    used = {name for one in restored for name in one.used}
    kept = {name: t for name, t in tensors.items() if name not in used and not name.endswith(_UNUSED)}
    twice = kept.keys() & {one.tensor.name for one in restored}
    if twice:
        raise CheckpointError(f"tensor {min(twice)} is stored both quantized and not; save the checkpoint again")
    kinds = sorted({one.tensor.dtype for one in restored})
    note = f"the source is already quantized ({', '.join(kinds)}; {len(restored)} tensors): its losses stay"
    return kept | {one.tensor.name: one.tensor for one in restored}, (note,)


def _method(said: Mapping[str, Any]) -> str:
    """Older configs of bitsandbytes and compressed-tensors don't name the method."""
    method = said.get("quant_method")
    if method is None and (said.get("load_in_4bit") or said.get("load_in_8bit")):
        return "bitsandbytes"
    if method is None and "config_groups" in said:
        return "compressed-tensors"
    return str(method)

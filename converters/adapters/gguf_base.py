"""Adapters merged into a GGUF: dequantized, turned back to the checkpoint's layout, changed, and forth again.

Only the tensors that an adapter changes make that round trip; the others pass as in any requantization.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import prod

import numpy as np

from converters.adapters.merge import merge_adapters
from converters.adapters.read import Adapter
from converters.architectures import find_gguf_architecture
from converters.architectures.spec import Array, Sizes, Weight, blocks, gguf_name, hf_names
from converters.gguf_config import gguf_config
from converters.sources import Source, SourceTensor
from converters.to_checkpoint import out_tensors
from converters.tokenizers.read import has_tokenizer, read_vocabulary
from converters.tokenizers.vocabulary import fit, vocabulary_from_metadata, vocabulary_metadata
from edgellm.errors import AdapterError


def as_checkpoint(source: Source) -> Source:
    """A GGUF under the names, in the layout and with the config of its checkpoint; read on demand."""
    arch = find_gguf_architecture(source.metadata)
    config = gguf_config(arch, source)
    complete = arch.complete_config(config)
    tensors = {
        tensor.name: SourceTensor(
            tensor.name, tensor.shape, "F32", 4 * prod(tensor.shape), partial(_read_part, tensor.read)
        )
        for tensor in out_tensors(arch, complete, arch.sizes(complete), source)
    }
    return Source(source.path, "gguf", config, tensors, source.metadata)


def _read_part(read: Callable[[], Array], k: int = 0, n: int = 1) -> Array:
    whole = read()
    return whole if n == 1 else np.split(whole, n)[k]


def merge_into_gguf(
    source: Source, adapters: Sequence[Adapter], pre: str | None = None, merge_base: str | None = None
) -> Source:
    """The GGUF with the adapters in it. Errors as of `merge_adapters`, and those of an unknown architecture."""
    view = as_checkpoint(source)
    merged = merge_adapters(view, adapters, merge_base)
    arch = find_gguf_architecture(source.metadata)
    config = arch.complete_config(merged.config)
    sizes = arch.sizes(config)
    tensors = dict(source.tensors)
    for weight in arch.weights:
        for i in blocks(weight, config, sizes):
            names, name = hf_names(weight, i, sizes), gguf_name(weight, i)
            if any(n not in merged.tensors or merged.tensors[n] is view.tensors.get(n) for n in names):
                continue
            if any(op.name.startswith("scale(") for op in weight.ops):
                raise AdapterError(
                    f"{source.path} has {name} multiplied by factors that a {arch.name} GGUF doesn't tell; "
                    "merge the adapter into the checkpoint it was trained on instead"
                )
            if name in source.tensors or weight.tied:
                dtype = source.tensors[name].dtype if name in source.tensors else "F32"
                tensors[name] = _forward(name, dtype, [merged.tensors[n] for n in names], weight, sizes)
    metadata = {**source.metadata, **_vocabulary(merged, tensors["token_embd.weight"].shape[0], pre)}
    if f"{arch.name}.vocab_size" in metadata:
        metadata[f"{arch.name}.vocab_size"] = tensors["token_embd.weight"].shape[0]
    return replace(source, tensors=tensors, metadata=metadata, notes=merged.notes)


def _vocabulary(merged: Source, n_vocab: int, pre: str | None) -> dict[str, object]:
    """The tokenizer entries that change: the adapter's own tokenizer, or rows it added."""
    if has_tokenizer(merged.tokenizer_folder):
        vocabulary = read_vocabulary(merged.tokenizer_folder, merged.config, pre)
    elif len(merged.metadata.get("tokenizer.ggml.tokens") or ()) not in (0, n_vocab):
        vocabulary = vocabulary_from_metadata(merged.metadata)
    else:
        return {}
    fitted = vocabulary_metadata(fit(vocabulary, n_vocab))
    if not vocabulary.templates:
        return fitted
    return {**dict.fromkeys(k for k in merged.metadata if k.startswith("tokenizer.chat_template")), **fitted}


def _forward(name: str, dtype: str, stored: list[SourceTensor], weight: Weight, sizes: Sizes) -> SourceTensor:
    """A tensor of the GGUF made of changed ones of the checkpoint."""

    def one(tensor: SourceTensor) -> Array:
        values = tensor.read()
        for op in weight.ops:
            values = op.forward(values, sizes)
        return np.ascontiguousarray(values)

    def read(k: int = 0, n: int = 1) -> Array:
        if len(stored) == 1:
            return _read_part(partial(one, stored[0]), k, n)
        share = len(stored) // n
        return np.stack([one(tensor) for tensor in stored[k * share : (k + 1) * share]])

    shape = _shape(stored, weight, sizes)
    return SourceTensor(name, shape, dtype, 4 * prod(shape), read)


def _shape(stored: list[SourceTensor], weight: Weight, sizes: Sizes) -> tuple[int, ...]:
    shape = tuple(sizes[size] if size in sizes else int(size) for size in weight.shape)
    if len(stored) == 1 and not weight.ops:
        return stored[0].shape  # a vocabulary may have grown
    return shape

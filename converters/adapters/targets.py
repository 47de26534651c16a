"""Which stored tensor an adapter's module is, whatever wrappers stand before its name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from converters.adapters.read import Adapter
from converters.architectures import find_architecture
from converters.architectures.spec import Arch, Sizes, Weight, blocks, hf_names
from converters.sources import Source, SourceTensor
from edgellm.errors import AdapterError

# model classes wrap one another, and checkpoints are saved from any depth
_WRAPPERS = re.compile(r"^(?:base_model\.|model\.|language_model\.|text_model\.|transformer\.)+")


@dataclass(frozen=True)
class Targets:
    """The tensors of a base, and what the family's spec says about them.

    by_name: a name without wrappers → the stored one. spec_of: likewise → its entry in the spec. transposed: stored
    tensors with inputs first. embedding, head: their stored names (the head's as it would be, if there is none).
    """

    source: Source
    arch: Arch
    config: Mapping[str, Any]
    sizes: Sizes
    tensors: Mapping[str, SourceTensor]
    by_name: Mapping[str, str]
    spec_of: Mapping[str, Weight]
    transposed: frozenset[str]
    embedding: str
    head: str
    tied: bool

    def get(self, name: str) -> str | None:
        """The stored name of a tensor as the adapter calls it, or None."""
        found = self.by_name.get(plain_name(name))
        for in_model, in_checkpoint in () if found else self.arch.module_names:
            found = found or self.by_name.get(plain_name(name.replace(in_model, in_checkpoint)))
        return found

    def find(self, name: str, adapter: Adapter) -> str:
        found = self.get(name)
        if found is None:
            raise AdapterError(
                f"{adapter.path} changes {name}, which {self.source.path} doesn't have; was it trained on another base?"
            )
        return found

    def linear_shape(self, name: str) -> tuple[int, ...]:
        """Outputs first."""
        shape = self.tensors[name].shape
        return shape[::-1] if name in self.transposed else shape


def find_targets(source: Source) -> Targets:
    """Look at a base; UnsupportedArchitecture and CheckpointError as for a conversion."""
    arch = find_architecture(source.config)
    config = arch.complete_config(source.config)
    sizes = arch.sizes(config)
    by_name = {plain_name(name): name for name in source.tensors}
    spec_of = {
        plain_name(name): weight
        for weight in arch.weights
        for i in blocks(weight, config, sizes)
        for name in hf_names(weight, i, sizes)
    }
    transposed = frozenset(
        stored
        for name, stored in by_name.items()
        if name in spec_of
        and len(source.tensors[stored].shape) == 2
        and any(op.name == "transpose" for op in spec_of[name].ops)
    )
    embedding, head = _stored_name(arch, by_name, "token_embd.weight"), _stored_name(arch, by_name, "output.weight")
    tied = bool(config.get("tie_word_embeddings")) and bool(head) and head not in source.tensors
    tensors = dict(source.tensors)
    if tied:
        by_name[plain_name(head)] = head
        tensors[head] = tensors[embedding]
    return Targets(source, arch, config, sizes, tensors, by_name, spec_of, transposed, embedding, head, tied)


def _stored_name(arch: Arch, by_name: Mapping[str, str], gguf: str) -> str:
    names = [weight.hf for weight in arch.weights if weight.gguf == gguf]
    return next((by_name[plain_name(name)] for name in names if plain_name(name) in by_name), names[0] if names else "")


def plain_name(name: str) -> str:
    return _WRAPPERS.sub("", name)

"""The families edgellm converts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from converters.architectures.gemma import GEMMA, GEMMA2, GEMMA3
from converters.architectures.gpt2 import GPT2
from converters.architectures.granite import GRANITE, GRANITE_MOE
from converters.architectures.llama import LLAMA
from converters.architectures.mixtral import MIXTRAL
from converters.architectures.olmo import OLMO2, OLMOE
from converters.architectures.phi3 import PHI3
from converters.architectures.qwen import QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE
from converters.architectures.smollm3 import SMOLLM3
from converters.architectures.spec import Arch, Config, hf_class
from converters.architectures.stablelm import STABLELM
from converters.architectures.starcoder2 import STARCODER2
from edgellm.errors import UnsupportedArchitecture

ARCHITECTURES: tuple[Arch, ...] = (
    LLAMA, MIXTRAL, SMOLLM3, QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE, GEMMA, GEMMA2, GEMMA3, PHI3, GPT2, STARCODER2,
    STABLELM, OLMO2, OLMOE, GRANITE, GRANITE_MOE,
)  # fmt: skip


def find_architecture(config: Config) -> Arch:
    """The family of a config.json; UnsupportedArchitecture names what was found and what there is."""
    wanted = hf_class(config)
    for arch in ARCHITECTURES:
        if wanted in arch.model_types:
            return arch
    raise UnsupportedArchitecture(f"model class {wanted} isn't supported; supported: {_supported()}")


def find_gguf_architecture(metadata: Mapping[str, Any]) -> Arch:
    """The family of a GGUF, by its metadata; UnsupportedArchitecture as above."""
    name = str(metadata.get("general.architecture", ""))
    has_experts = bool(metadata.get(f"{name}.expert_count"))
    for arch in ARCHITECTURES:
        if arch.name == name and has_experts == any("n_expert" in weight.shape for weight in arch.weights):
            return arch
    known = ", ".join(arch.name for arch in ARCHITECTURES)
    raise UnsupportedArchitecture(f"architecture {name!r} can't be written as a checkpoint; supported: {known}")


def _supported() -> str:
    return ", ".join(name for arch in ARCHITECTURES for name in arch.model_types)

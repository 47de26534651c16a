"""The families edgellm converts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from converters.architectures.arcee import ARCEE
from converters.architectures.bert import BERT, NOMIC_BERT
from converters.architectures.exaone4 import EXAONE4
from converters.architectures.falcon_h1 import FALCON_H1
from converters.architectures.gemma import EMBEDDING_GEMMA, GEMMA, GEMMA2, GEMMA3
from converters.architectures.gemma4 import GEMMA4
from converters.architectures.glm4 import GLM4
from converters.architectures.gpt2 import GPT2
from converters.architectures.gpt_oss import GPT_OSS
from converters.architectures.granite import GRANITE, GRANITE_MOE
from converters.architectures.lfm2 import LFM2, LFM2_MOE
from converters.architectures.llama import LLAMA
from converters.architectures.minicpm import MINICPM
from converters.architectures.ministral3 import MINISTRAL3
from converters.architectures.mixtral import MIXTRAL
from converters.architectures.olmo import OLMO2, OLMOE
from converters.architectures.phi3 import PHI3
from converters.architectures.qwen import QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE
from converters.architectures.qwen35 import QWEN35
from converters.architectures.smollm3 import SMOLLM3
from converters.architectures.spec import Arch, Config, hf_class
from converters.architectures.stablelm import STABLELM
from converters.architectures.starcoder2 import STARCODER2
from edgellm.errors import UnsupportedArchitecture

ARCHITECTURES: tuple[Arch, ...] = (
    LLAMA, MIXTRAL, SMOLLM3, QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE, GEMMA, GEMMA2, GEMMA3, PHI3, GPT2, STARCODER2,
    STABLELM, OLMO2, OLMOE, GRANITE, GRANITE_MOE, GLM4, EXAONE4,
    LFM2, LFM2_MOE, MINISTRAL3, GPT_OSS, FALCON_H1, QWEN35, MINICPM,
    EMBEDDING_GEMMA, GEMMA4, BERT, NOMIC_BERT, ARCEE,
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

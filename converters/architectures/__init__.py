"""The families edgellm converts."""

from __future__ import annotations

from converters.architectures.llama import LLAMA
from converters.architectures.spec import Arch, Config, hf_class
from edgellm.errors import UnsupportedArchitecture

ARCHITECTURES: tuple[Arch, ...] = (LLAMA,)


def find_architecture(config: Config) -> Arch:
    """The family of a config.json; UnsupportedArchitecture names what was found and what there is."""
    wanted = hf_class(config)
    for arch in ARCHITECTURES:
        if wanted in arch.hf_classes:
            return arch
    raise UnsupportedArchitecture(f"model class {wanted} isn't supported; supported: {_supported()}")


def find_gguf_architecture(name: str) -> Arch:
    """The family of a GGUF's general.architecture; UnsupportedArchitecture as above."""
    for arch in ARCHITECTURES:
        if arch.name == name:
            return arch
    known = ", ".join(arch.name for arch in ARCHITECTURES)
    raise UnsupportedArchitecture(f"architecture {name!r} can't be written as a checkpoint; supported: {known}")


def _supported() -> str:
    return ", ".join(name for arch in ARCHITECTURES for name in arch.hf_classes)

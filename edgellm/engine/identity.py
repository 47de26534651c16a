"""Which model, in which state, a saved memory belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgellm.catalog.partners import fingerprint
from edgellm.native import library
from edgellm.native.lora import Adapter


def memory_maker(
    path: Path, metadata: Mapping[str, Any], adapters: Sequence[tuple[Adapter, float]], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """All that must be the same for a saved memory to be used, by names that people understand. n_ctx may differ."""
    import hashlib

    architecture = str(metadata.get("general.architecture", ""))
    numbers = sorted((key, str(value)) for key, value in metadata.items() if key.startswith(f"{architecture}."))
    template = str(metadata.get("tokenizer.chat_template", ""))
    return {
        "model": fingerprint(path),
        "metadata": hashlib.sha256(repr(numbers).encode()).hexdigest(),
        "set of adapters": [[fingerprint(adapter.file.path), scale] for adapter, scale in adapters],
        "chat template": hashlib.sha256(template.encode("utf-8", "replace")).hexdigest(),
        "type of KV cache": settings["kv_type"],
        "flash attention": settings["flash_attn"],
        "version of llama.cpp": library.version(),
    }

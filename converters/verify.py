"""Checks a written file against its plan and its source before it gets its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from converters.plan import Plan
from converters.tokenizers.corpus import sample_texts
from edgellm.errors import CheckpointError, TokenizerError
from edgellm.gguf_header import check_loadable
from edgellm.native.probe import probe

_UNICODE_FORMS = ("NFC", "NFD", "NFKC", "NFKD")
Encode = Callable[[str], list[int]]


def verify(partial: Path, plan: Plan, metadata: Mapping[str, Any], reference: Encode | None) -> tuple[str, ...]:
    """Lines that say what was checked; an error where something is wrong.

    reference: token ids of a text by the checkpoint's own tokenizer, without special tokens.
    """
    header = check_loadable(partial, unfinished=True)
    planned = {tensor.name: (tensor.shape, tensor.type_name) for tensor in plan.tensors}
    written = {name: (info.shape, info.type_name) for name, info in header.tensors.items()}
    if planned != written:
        wrong = sorted(set(planned.items()) ^ set(written.items()))[0][0]
        raise CheckpointError(f"the written file is wrong: tensor {wrong} isn't as planned; please report this")
    lost = [key for key in metadata if key not in header.metadata and metadata[key] not in ([], ())]
    if lost:
        raise CheckpointError(f"the written file is wrong: it lacks {lost[0]}; please report this")
    checks = [f"structure: {len(written)} tensors and {len(header.metadata)} metadata entries read back as planned"]
    has_vocabulary = "tokenizer.ggml.tokens" in metadata
    texts = sample_texts() if has_vocabulary else []
    seen = probe(partial, texts)
    if not seen.logits_finite:
        raise CheckpointError("llama.cpp computes logits that are not finite or all equal; the weights are damaged")
    checks.append("loaded by llama.cpp in a process of its own: logits finite")
    if reference is not None:
        _compare_ids(texts, seen.ids, reference)
        checks.append(f"tokenizer: {len(texts)} strings compared with the checkpoint's own, all equal")
    return tuple(checks)


def _compare_ids(texts: list[str], ids: list[list[int]], reference: Encode) -> None:
    for text, ours in zip(texts, ids, strict=True):
        expected = reference(text)
        if ours != expected:
            raise TokenizerError(
                f"llama.cpp tokenizes {text[:60]!r} as {ours[:12]}, the checkpoint's own tokenizer as {expected[:12]}; "
                "give the right pre-tokenizer with --pre"
            )


def reference_encoder(folder: Path) -> Encode | None:
    """The checkpoint's own tokenizer as a function, or None for a source without one."""
    if (folder / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        # llama.cpp has no Unicode normalization, which the receipt notes; compared is what comes after it
        plain = Tokenizer.from_str(tokenizer.to_str())
        if str(tokenizer.normalizer).startswith(_UNICODE_FORMS):
            plain.normalizer = None
        return lambda text: list(plain.encode(text, add_special_tokens=False).ids)
    if (folder / "tokenizer.model").is_file():
        from sentencepiece import SentencePieceProcessor

        processor = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        return lambda text: list(processor.EncodeAsIds(text))
    return None

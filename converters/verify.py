"""Checks a written file against its plan and its source before it gets its name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from converters.damage import blamed_on
from converters.plan import Plan
from converters.tokenizers.corpus import sample_texts
from converters.tokenizers.differences import known_difference
from converters.tokenizers.pretokenizer import unicode_forms
from converters.tokenizers.read import sentencepiece_file
from converters.tokenizers.special import read_optional_json, read_templates
from converters.tokenizers.tekken import read_tekken
from converters.tokenizers.tokenizer_json import build_tokenizer_json
from converters.tokenizers.vocabulary import SPECIAL_KEYS
from edgellm.errors import CheckpointError, TokenizerError
from edgellm.gguf_header import check_loadable
from edgellm.native.probe import probe

Encode = Callable[[str], list[int]]


def verify(partial: Path, plan: Plan, metadata: Mapping[str, Any], folder: Path) -> tuple[str, ...]:
    """Lines that say what was checked; an error where something is wrong.

    folder: where the checkpoint's own tokenizer is; a GGUF source has none.
    """
    header = check_loadable(partial)
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
    if folder.is_dir():
        reference = reference_encoder(folder)
        checks += [_compare_ids(texts, seen.ids, reference, metadata)] if reference else []
        check_special_tokens(folder, header.metadata)
        checks += filter(None, [check_template(folder, header.metadata)])
    return tuple(checks)


def _compare_ids(texts: list[str], ids: list[list[int]], reference: Encode, metadata: Mapping[str, Any]) -> str:
    """The receipt's line on the tokenizer; TokenizerError for a difference that isn't llama.cpp's own."""
    reasons: dict[str, int] = {}
    for text, ours in zip(texts, ids, strict=True):
        expected = reference(text)
        if ours == expected:
            continue
        reason = known_difference(metadata, text)
        if reason is None:
            raise TokenizerError(
                f"llama.cpp tokenizes {text[:60]!r} as {ours[:12]}, the checkpoint's own tokenizer as {expected[:12]}; "
                "give the right pre-tokenizer with --pre"
            )
        reasons[reason] = reasons.get(reason, 0) + 1
    if not reasons:
        return f"tokenizer: {len(texts)} strings compared with the checkpoint's own, all equal"
    others = ", ".join(f"{n} with {reason}" for reason, n in reasons.items())
    n_equal = len(texts) - sum(reasons.values())
    return (
        f"tokenizer: {len(texts)} strings compared with the checkpoint's own, {n_equal} equal; "
        f"llama.cpp is known to differ in the others: {others}"
    )


def reference_encoder(folder: Path) -> Encode | None:
    """The checkpoint's own tokenizer as a function, None for a source without one; TokenizerError if it is damaged."""
    with blamed_on(folder, TokenizerError, foreign=True):
        return _reference_encoder(folder)


def _reference_encoder(folder: Path) -> Encode | None:
    if (folder / "tokenizer.json").is_file():
        return _tokenizers_encoder((folder / "tokenizer.json").read_text(encoding="utf-8"))
    if (folder / "tekken.json").is_file():
        # the library reads no tekken.json: the pattern and the merges go through its own engine
        return _tokenizers_encoder(json.dumps(build_tokenizer_json(read_tekken(folder, {}))))
    if path := sentencepiece_file(folder):
        from sentencepiece import SentencePieceProcessor

        processor = SentencePieceProcessor(model_file=str(path))
        return lambda text: list(processor.EncodeAsIds(text))
    return None


def _tokenizers_encoder(content: str) -> Encode:
    """The `tokenizers` library on a tokenizer.json, the text of control tokens taken as text."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(content)
    tokenizer.no_padding()  # what a fine-tune was trained with stays in the file
    tokenizer.no_truncation()
    # llama.cpp has no Unicode normalization, which the receipt notes; compared is what comes after it
    if unicode_forms(json.loads(content).get("normalizer")):
        tokenizer.normalizer = None
    tokenizer.encode_special_tokens = True
    return lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids)


def check_template(folder: Path, metadata: Mapping[str, Any]) -> str:
    """The receipt's line on the chat templates, against the checkpoint's own; TokenizerError where one isn't the same.

    The texts are compared, so that what tools, system messages and dates make of them is the same too.
    """
    theirs = {name: text for name, text in read_templates(folder).items() if text.strip()}
    for name, text in theirs.items():
        key = "tokenizer.chat_template" + ("" if name == "default" else f".{name}")
        if key not in metadata:
            raise TokenizerError(f"the chat template of the checkpoint ({name}) didn't get into the file; report this")
        if metadata[key] != text:
            raise TokenizerError(
                f"the chat template in the file ({name}) renders another prompt than the checkpoint's; report this"
            )
    named = f", and {len(theirs) - 1} more by name" if len(theirs) > 1 and "default" in theirs else ""
    return f"chat template: renders the checkpoint's prompts{named}" if theirs else ""


def check_special_tokens(folder: Path, metadata: Mapping[str, Any]) -> None:
    """TokenizerError where a begin, an end or another special token isn't the one that the checkpoint names."""
    tokens = metadata.get("tokenizer.ggml.tokens") or []
    stated = read_optional_json(folder / "special_tokens_map.json") | read_optional_json(
        folder / "tokenizer_config.json"
    )
    for name, key in SPECIAL_KEYS.items():
        text = stated.get(f"{name}_token")
        text = text.get("content") if isinstance(text, dict) else text
        if not isinstance(text, str) or text not in tokens:
            continue
        found = metadata.get(key)
        if found is None or tokens[found] != text:
            raise TokenizerError(f"the file's {name} token is {found}, the checkpoint's {text!r}; please report this")

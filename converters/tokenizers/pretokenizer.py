"""Which of llama.cpp's pre-tokenizers a tokenizer.json's pipeline is, told by its structure; and the way back.

llama.cpp's own script identifies it by hashing a tokenization, which an added token or a newer transformers
breaks. Here the whole pre_tokenizer (and what else matters) is compared with a table; no match is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edgellm.errors import TokenizerError

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CL100K = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _TAIL
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _TAIL
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SLASH_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|" + _SLASH_TAIL
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|"
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?|\p{{N}}{{1,3}}|" + _SLASH_TAIL
)


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


@dataclass(frozen=True)
class PreTokenizer:
    """`steps` of the pre_tokenizer in tokenizer.json. ignore_merges None: of no consequence for this one."""

    name: str
    steps: tuple[Mapping[str, Any], ...]
    ignore_merges: bool | None = False
    normalizer: str | None = None  # type of the normalizer that belongs to it; llama.cpp applies none
    aliases: tuple[str, ...] = field(default=())


PRE_TOKENIZERS: tuple[PreTokenizer, ...] = (
    PreTokenizer(
        "smollm",
        ({"type": "Digits", "individual_digits": True}, _byte_level(True)),
        aliases=("starcoder", "refact", "command-r"),
    ),
    PreTokenizer("gpt-2", (_byte_level(True),), aliases=("mpt", "olmo", "phi-2")),
    PreTokenizer(
        "llama-bpe", (_split(_CL100K), _byte_level(False)), ignore_merges=True, aliases=("llama3", "falcon3", "lfm2")
    ),
    PreTokenizer("smaug-bpe", (_split(_CL100K), _byte_level(False)), aliases=("dbrx",)),
    PreTokenizer("qwen2", (_split(_QWEN2), _byte_level(False)), normalizer="NFC", aliases=("deepseek-r1-qwen",)),
    PreTokenizer("tekken", (_split(_TEKKEN), _byte_level(False)), ignore_merges=True),
    PreTokenizer("gpt-4o", (_split(_GPT4O), _byte_level(False)), ignore_merges=None, aliases=("llama4",)),
)


def identify(tokenizer: Mapping[str, Any]) -> str:
    """`tokenizer.ggml.pre` for a byte-level BPE tokenizer.json; TokenizerError shows the pipeline that has no match."""
    seen = tokenizer.get("pre_tokenizer") or {}
    steps = _canonical(seen.get("pretokenizers", []) if seen.get("type") == "Sequence" else [seen])
    ignore_merges = bool(tokenizer["model"].get("ignore_merges", False))
    for pre in PRE_TOKENIZERS:
        if _canonical(pre.steps) == steps and pre.ignore_merges in (None, ignore_merges):
            return pre.name
    raise TokenizerError(
        f"tokenizer.json has a pre-tokenizer that edgellm doesn't know: {_short(seen)}, ignore_merges={ignore_merges}; "
        f"if llama.cpp knows it, name it with --pre ({', '.join(p.name for p in PRE_TOKENIZERS)} …)"
    )


def find_pre_tokenizer(name: str) -> PreTokenizer:
    """The table's entry for a GGUF's tokenizer.ggml.pre; TokenizerError where there is none."""
    for pre in PRE_TOKENIZERS:
        if name == pre.name or name in pre.aliases:
            return pre
    known = ", ".join(pre.name for pre in PRE_TOKENIZERS)
    raise TokenizerError(f"pre-tokenizer {name!r} can't be written as a tokenizer.json; known: {known}")


def _canonical(steps: Any) -> list[dict[str, Any]]:
    """Steps with what doesn't change token ids left out and equivalent spellings made one."""
    out = []
    for step in steps:
        kept = {key: value for key, value in step.items() if key not in ("trim_offsets",)}
        if kept.get("type") == "ByteLevel":
            kept.setdefault("use_regex", True)
            kept.setdefault("add_prefix_space", True)
        if kept.get("type") == "Split" and kept.get("behavior") == "Removed" and kept.get("invert") is True:
            kept |= {"behavior": "Isolated", "invert": False}  # an older spelling: keep the matches, which cover all
        out.append(kept)
    return out


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 300 else text[:297] + "…"

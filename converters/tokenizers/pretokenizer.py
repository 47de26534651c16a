"""Which of llama.cpp's pre-tokenizers a byte-level tokenizer.json's pipeline is, told by its structure; and back.

llama.cpp's own script identifies it by hashing a tokenization, which an added token or a newer transformers
breaks. Here the whole pre_tokenizer (and what else matters) is compared with a table; no match is an error.
The pipelines are those of the checkpoints' own tokenizer.json files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from converters.tokenizers import patterns
from edgellm.errors import TokenizerError

_UNICODE_FORMS = ("NFC", "NFD", "NFKC", "NFKD")
_LITERAL_BREAKS = {"\r": r"\r", "\n": r"\n"}
# equivalent spellings of the contractions in regexes
_CONTRACTION_SPELLINGS = (
    "'(?i:[sdmt]|ll|ve|re)",
    "(?i:'s|'t|'re|'ve|'m|'d|'ll)",
    "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])",
)
Step = Mapping[str, Any]


def _byte_level(use_regex: bool = False) -> Step:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _split(regex: str) -> Step:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def _splits(*regexes: str) -> tuple[Step, ...]:
    return (*map(_split, regexes), _byte_level())


def _digits(individual: bool) -> Step:
    return {"type": "Digits", "individual_digits": individual}


@dataclass(frozen=True)
class PreTokenizer:
    """`steps` of the pre_tokenizer in tokenizer.json.

    ignore_merges and bos (is there a BOS token) tell entries with the same steps apart; None: of no consequence.
    aliases: other names that llama.cpp gives the same splitting, or nearly. note: goes into the receipt.
    """

    name: str
    steps: tuple[Step, ...]
    ignore_merges: bool | None = None
    bos: bool | None = None
    normalizer: str | None = None  # type of the normalizer that belongs to it; llama.cpp applies none
    aliases: tuple[str, ...] = ()
    note: str = ""


# "smollm" before its aliases, "qwen2" before "stablelm2": llama.cpp splits the same, but the aliases' detokenization
# removes spaces before punctuation
PRE_TOKENIZERS: tuple[PreTokenizer, ...] = (
    PreTokenizer(
        "smollm",
        (_digits(True), _byte_level(True)),
        aliases=("starcoder", "refact", "command-r", "exaone", "codeshell", "minerva-7b", "mellum2"),
    ),
    PreTokenizer(
        "gpt-2",
        (_byte_level(True),),
        aliases=(
            "mpt", "olmo", "phi-2", "exaone4", "granite-docling", "trillion", "jais", "mellum", "modern-bert",
            "gigachat", "a.x-4.0", "roberta-bpe", "jina-es", "jina-de", "jina-v1-en", "jina-v2-es", "jina-v2-de",
            "jina-v2-code",
        ),
    ),
    PreTokenizer(
        "llama-bpe",
        _splits(patterns.CL100K),
        ignore_merges=True,
        bos=True,
        aliases=("llama3", "llama-v3", "falcon3", "falcon-h1", "lfm2", "pixtral", "midm-2.0", "jina-v5-nano"),
    ),
    PreTokenizer("glm4", _splits(patterns.CL100K), ignore_merges=True, bos=False, aliases=("glm5",)),
    PreTokenizer("smaug-bpe", _splits(patterns.CL100K), ignore_merges=False, bos=True, aliases=("dbrx",)),
    PreTokenizer("chatglm-bpe", _splits(patterns.CL100K), ignore_merges=False, bos=False),
    PreTokenizer(
        "qwen2",
        _splits(patterns.QWEN2),
        normalizer="NFC",
        aliases=("deepseek-r1-qwen", "stablelm2", "megrez", "kormo", "f2llmv2", "hunyuan", "solar-open", "grok-2"),
    ),
    PreTokenizer("qwen35", _splits(patterns.QWEN35), normalizer="NFC"),
    PreTokenizer(
        "tekken",
        _splits(patterns.TEKKEN),
        ignore_merges=True,
        note="llama.cpp splits words at combining marks (Indic scripts, Thai, vowel points), the tokenizer doesn't",
    ),
    # what llama.cpp calls gpt-4o forgets combining marks (430 of 6,013 texts differ, with this name 1)
    PreTokenizer(
        "granite-embed-multi-97m",
        _splits(patterns.O200K),
        aliases=("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"),
        note="the pre-tokenizer is gpt-4o's; a llama.cpp that doesn't know the name of its exact form, "
        "granite-embed-multi-97m, needs --pre gpt-4o",
    ),
    PreTokenizer("deepseek-v3", _splits(*patterns.DEEPSEEK_V3), aliases=("hunyuan-dense", "joyai-llm", "hy_v4")),
    PreTokenizer("deepseek-llm", (*map(_split, patterns.DEEPSEEK_LLM), _digits(True), _byte_level())),
    PreTokenizer("deepseek-coder", (*map(_split, patterns.DEEPSEEK_CODER), _digits(True), _byte_level())),
    PreTokenizer(
        "falcon",
        (
            {"type": "Punctuation", "behavior": "Contiguous"},
            _byte_level(True),
            _digits(False),
            _split("[0-9][0-9][0-9]"),
        ),
    ),
    PreTokenizer("bloom", _splits(patterns.BLOOM), aliases=("poro-chat", "gpt3-finnish")),
    PreTokenizer("viking", (_split(patterns.BLOOM), _digits(True), _byte_level())),
    PreTokenizer("bailingmoe", _splits(patterns.BAILING), aliases=("bailingmoe2", "llada-moe")),
    PreTokenizer("seed-coder", _splits(patterns.SEED_CODER)),
    PreTokenizer("exaone-moe", _splits(patterns.EXAONE_MOE)),
    PreTokenizer("jais-2", _splits(patterns.JAIS2)),
    PreTokenizer("minicpm5", _splits(*patterns.MINICPM5), ignore_merges=True),
    PreTokenizer("tiny_aya", _splits(*patterns.TINY_AYA), aliases=("cohere2moe",)),
)  # fmt: skip


def identify(tokenizer: Mapping[str, Any], has_bos: bool = True) -> str:
    """`tokenizer.ggml.pre` for a byte-level BPE tokenizer.json; TokenizerError shows the pipeline that has no match."""
    seen = tokenizer.get("pre_tokenizer") or {}
    steps = _canonical(_flat(seen, "pretokenizers"))
    ignore_merges = bool(tokenizer["model"].get("ignore_merges", False))
    forms = unicode_forms(tokenizer.get("normalizer"))
    for pre in PRE_TOKENIZERS:
        fits = pre.ignore_merges in (None, ignore_merges) and pre.bos in (None, has_bos)
        if fits and forms is not None and _canonical(pre.steps) == steps:
            return pre.name
    others = f", normalizer={_short(tokenizer.get('normalizer'))}" if forms is None else ""
    raise TokenizerError(
        f"tokenizer.json has a pre-tokenizer that edgellm doesn't know: {_short(seen)}, ignore_merges={ignore_merges}"
        f"{others}; if llama.cpp knows it, name it with --pre ({', '.join(p.name for p in PRE_TOKENIZERS)} …)"
    )


def unicode_forms(normalizer: Any) -> tuple[str, ...] | None:
    """Unicode normalization forms a normalizer applies, or None where it does more than that."""
    kinds = tuple(str(step.get("type")) for step in _flat(normalizer or {}, "normalizers"))
    return kinds if all(kind in _UNICODE_FORMS for kind in kinds) else None


def find_pre_tokenizer(name: str) -> PreTokenizer:
    """The table's entry for a GGUF's tokenizer.ggml.pre; TokenizerError where there is none."""
    for pre in PRE_TOKENIZERS:
        if name == pre.name or name in pre.aliases:
            return pre
    known = ", ".join(pre.name for pre in PRE_TOKENIZERS)
    raise TokenizerError(f"pre-tokenizer {name!r} can't be written as a tokenizer.json; known: {known}")


def _flat(step: Any, parts: str) -> list[Step]:
    """A step's own steps, sequences within sequences opened."""
    if not isinstance(step, Mapping) or not step:
        return []
    if step.get("type") != "Sequence":
        return [step]
    return [inner for part in step.get(parts) or [] for inner in _flat(part, parts)]


def _canonical(steps: Sequence[Step]) -> list[dict[str, Any]]:
    """Steps with what doesn't change token ids left out and equivalent spellings made one."""
    out = []
    for step in steps:
        kept = {key: value for key, value in step.items() if key != "trim_offsets"}
        if kept.get("type") == "ByteLevel":
            kept.setdefault("use_regex", True)
            kept.setdefault("add_prefix_space", True)
        if kept.get("type") == "Split":
            if kept.get("behavior") == "Removed" and kept.get("invert") is True:
                kept |= {"behavior": "Isolated", "invert": False}  # keep the matches, which cover all
            pattern = kept.get("pattern")
            if isinstance(pattern, Mapping) and isinstance(pattern.get("Regex"), str):
                kept["pattern"] = {"Regex": _one_spelling(pattern["Regex"])}
        out.append(kept)
    return out


def _one_spelling(regex: str) -> str:
    for spelling in _CONTRACTION_SPELLINGS:
        regex = regex.replace(spelling, patterns.CONTRACTIONS)
    regex = regex.replace("{1}", "")
    regex = re.sub(r"(?<=[?+])\+", "", regex)  # possessive: gives up backtracking, which never succeeds here
    return "".join(_LITERAL_BREAKS.get(char, char) for char in regex)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 300 else text[:297] + "…"

"""tekken.json, Mistral's own file: byte-level BPE in tiktoken's form, special tokens first."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converters.sources.huggingface import read_json_object
from converters.tokenizers.pretokenizer import PRE_TOKENIZERS, identify
from converters.tokenizers.special import read_templates, special_ids
from converters.tokenizers.vocabulary import TokenType, Vocabulary
from edgellm.errors import TokenizerError

# special tokens of files that don't list them (version v3), and their ids
_EARLY_SPECIAL = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]",
    "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
)  # fmt: skip
_NAMES = {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "pad": "<pad>"}


def read_tekken(folder: Path, config: Mapping[str, Any], pre: str | None = None) -> Vocabulary:
    """The vocabulary of a folder's tekken.json. pre overrides the pre-tokenizer's identification."""
    content = read_json_object(folder / "tekken.json")
    settings = content.get("config")
    if not isinstance(settings, dict) or not isinstance(content.get("vocab"), list):
        raise TokenizerError(f"{folder / 'tekken.json'} has no config and vocabulary; copy it again")
    special_tokens, n_special = _special(content, settings)
    n_plain = int(settings.get("default_vocab_size", n_special + len(content["vocab"]))) - n_special
    ranks = _ranks(content["vocab"][: max(n_plain, 0)])
    tokens = special_tokens + [_spell(piece) for piece in ranks]
    types = [int(TokenType.CONTROL)] * n_special + [int(TokenType.NORMAL)] * len(ranks)
    ids = {token: i for i, token in enumerate(special_tokens)}
    special = special_ids(folder, config, ids)
    special |= {name: ids[text] for name, text in _NAMES.items() if text in ids}
    name = pre or _identify(settings)
    return Vocabulary(
        model="gpt2",
        pre=name,
        tokens=tokens,
        types=types,
        merges=_merges(ranks),
        special=special,
        add_bos="bos" in special,
        templates=read_templates(folder),
        notes=tuple(entry.note for entry in PRE_TOKENIZERS if entry.name == name and entry.note),
    )


def _special(content: Mapping[str, Any], settings: Mapping[str, Any]) -> tuple[list[str], int]:
    """Texts of the special tokens, as many as the ids kept for them."""
    n_special = int(settings.get("default_num_special_tokens", 0))
    if not 0 < n_special < 100_000:
        raise TokenizerError(f"tekken.json keeps {n_special} ids for special tokens; it is damaged")
    listed = content.get("special_tokens")
    named = dict(enumerate(_EARLY_SPECIAL))
    if listed:
        named = {int(entry["rank"]): str(entry["token_str"]) for entry in listed}
    return [named.get(i, f"<SPECIAL_{i}>") for i in range(n_special)], n_special


def _ranks(entries: list[Any]) -> dict[bytes, int]:
    """The bytes of each piece, in order of rank."""
    try:
        ranks = {base64.b64decode(entry["token_bytes"], validate=True): i for i, entry in enumerate(entries)}
    except (binascii.Error, KeyError, TypeError) as exc:
        raise TokenizerError("tekken.json has a piece whose bytes can't be read; it is damaged") from exc
    if len(ranks) != len(entries) or not all(bytes([byte]) in ranks for byte in range(256)):
        raise TokenizerError("tekken.json lacks a byte or has a piece twice; it is damaged")
    return ranks


def _identify(settings: Mapping[str, Any]) -> str:
    split = {"type": "Split", "pattern": {"Regex": settings.get("pattern")}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    pipeline = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    return identify({"pre_tokenizer": pipeline, "model": {"ignore_merges": True}})


def _merges(ranks: Mapping[bytes, int]) -> list[str]:
    """The two pieces each piece is merged from: what BPE with lower ranks alone leaves of it."""
    return [
        " ".join(_spell(part) for part in parts)
        for piece, rank in ranks.items()
        if len(piece) > 1 and len(parts := _split(piece, ranks, rank)) == 2
    ]


def _split(piece: bytes, ranks: Mapping[bytes, int], limit: int) -> list[bytes]:
    parts = [bytes([byte]) for byte in piece]
    while len(parts) > 2:
        pairs = [(ranks.get(parts[i] + parts[i + 1], limit), i) for i in range(len(parts) - 1)]
        rank, at = min(pairs)
        if rank >= limit:
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def _byte_letters() -> dict[int, str]:
    """GPT-2's printable letter for each byte."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}


_LETTERS = _byte_letters()


def _spell(piece: bytes) -> str:
    return "".join(_LETTERS[byte] for byte in piece)

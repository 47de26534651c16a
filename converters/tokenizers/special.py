"""Special tokens and chat templates out of the small JSON files beside a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converters.sources.huggingface import read_json_object

_NAMES = ("bos", "eos", "unk", "sep", "pad", "mask", "cls")


def read_optional_json(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where there is no such file."""
    return read_json_object(path) if path.exists() else {}


def special_ids(folder: Path, config: Mapping[str, Any], id_of: Mapping[str, int]) -> dict[str, int]:
    """Special token name → id. Texts in the tokenizer's files come first, ids in the config files second.

    Several end-of-sequence ids (as Llama 3.1 has) become eos, eom and eot, the three that llama.cpp stops at.
    """
    texts = read_optional_json(folder / "special_tokens_map.json") | read_optional_json(
        folder / "tokenizer_config.json"
    )
    generation = read_optional_json(folder / "generation_config.json")
    found: dict[str, int] = {}
    for name in _NAMES:
        text = texts.get(f"{name}_token")
        text = text.get("content") if isinstance(text, dict) else text
        if isinstance(text, str) and text in id_of:
            found[name] = id_of[text]
            continue
        ids = _ids(generation.get(f"{name}_token_id")) or _ids(config.get(f"{name}_token_id"))
        if ids:
            found[name] = ids[0]
    ends = _ids(generation.get("eos_token_id")) or _ids(config.get("eos_token_id"))
    found |= _other_ends(ends, found.get("eos"), id_of)
    return {name: number for name, number in found.items() if number < len(id_of)}


def _other_ends(ends: list[int], eos: int | None, id_of: Mapping[str, int]) -> dict[str, int]:
    others = [number for number in ends if number != eos]
    eom = id_of.get("<|eom_id|>")
    out: dict[str, int] = {}
    if eom in others:
        others.remove(eom)
        out["eom"] = eom
    if others:
        out["eot"] = others.pop()
    if others:
        out.setdefault("eom", others.pop())
    return out


def _ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [number for number in values if type(number) is int and number >= 0]


def read_templates(folder: Path) -> dict[str, str]:
    """Chat templates by name, from every place transformers keeps them; "default" is the chat's own."""
    templates: dict[str, str] = {}
    stored = read_optional_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(stored, str):
        templates["default"] = stored
    elif isinstance(stored, list):
        templates |= {
            str(entry["name"]): entry["template"]
            for entry in stored
            if isinstance(entry, dict) and "name" in entry and isinstance(entry.get("template"), str)
        }
    older = read_optional_json(folder / "chat_template.json").get("chat_template")
    if isinstance(older, str):
        templates.setdefault("default", older)
    if (folder / "chat_template.jinja").exists():
        templates["default"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        templates[path.stem] = path.read_text(encoding="utf-8")
    return templates

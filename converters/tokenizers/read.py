"""Finds a checkpoint folder's tokenizer, of whichever kind it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converters.damage import blamed_on
from converters.tokenizers.vocabulary import Vocabulary
from edgellm.errors import TokenizerError


def read_vocabulary(folder: Path, config: Mapping[str, Any], pre: str | None = None) -> Vocabulary:
    """tokenizer.json if there is one, else tekken.json, else tokenizer.model; TokenizerError where there is none."""
    with blamed_on(folder, TokenizerError):
        return _read(folder, config, pre)


def _read(folder: Path, config: Mapping[str, Any], pre: str | None) -> Vocabulary:
    if (folder / "tokenizer.json").is_file():
        from converters.tokenizers.tokenizer_json import read_tokenizer_json

        return read_tokenizer_json(folder, config, pre)
    if (folder / "tekken.json").is_file():
        from converters.tokenizers.tekken import read_tekken

        return read_tekken(folder, config, pre)
    if path := sentencepiece_file(folder):
        from converters.tokenizers.sentencepiece_model import read_sentencepiece_model

        return read_sentencepiece_model(path, config)
    raise TokenizerError(
        f"{folder} has no tokenizer.json, tekken.json or tokenizer.model; copy the base model's tokenizer there"
    )


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer of any kind."""
    if not folder.is_dir():
        return False
    names = ("tokenizer.json", "tekken.json")
    return any((folder / name).is_file() for name in names) or sentencepiece_file(folder) is not None


def sentencepiece_file(folder: Path) -> Path | None:
    """The folder's SentencePiece model: tokenizer.model, or Mistral's tokenizer.model.v3 and the like."""
    versions = sorted(folder.glob("tokenizer.model.v*"))
    return next((path for path in (folder / "tokenizer.model", *versions) if path.is_file()), None)

"""Finds a checkpoint folder's tokenizer, of whichever kind it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converters.tokenizers.vocabulary import Vocabulary
from edgellm.errors import TokenizerError


def read_vocabulary(folder: Path, config: Mapping[str, Any], pre: str | None = None) -> Vocabulary:
    """tokenizer.json if there is one, else tokenizer.model; TokenizerError where there is neither."""
    if (folder / "tokenizer.json").is_file():
        from converters.tokenizers.tokenizer_json import read_tokenizer_json

        return read_tokenizer_json(folder, config, pre)
    if (folder / "tokenizer.model").is_file():
        from converters.tokenizers.sentencepiece_model import read_sentencepiece_model

        return read_sentencepiece_model(folder, config)
    raise TokenizerError(f"{folder} has no tokenizer.json or tokenizer.model; copy the base model's tokenizer there")

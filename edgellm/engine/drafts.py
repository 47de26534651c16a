"""Which drafts a model's generations use: what was asked for, opened when first used, kept until the model closes."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from edgellm.catalog.cards import card_for, resolve
from edgellm.catalog.partners import partners_of, set_partners
from edgellm.config import LoadParams
from edgellm.errors import DraftMismatch, EdgeLLMError, GenerationError
from edgellm.gguf_header import GGUFHeader, check_loadable, read_header
from edgellm.native.context import Context
from edgellm.native.model import NativeModel
from edgellm.speculation.depth import MAX_DRAFT, Depth
from edgellm.speculation.drafts import Draft, DraftChoice, ForcedDraft, NgramDraft
from edgellm.speculation.model_draft import ModelDraft, check_same_vocabulary
from edgellm.speculation.text_index import IndexDraft, is_index
from edgellm.speculation.verify import Speculator

if TYPE_CHECKING:
    from edgellm.constraint import Matcher

logger = logging.getLogger(__name__)

N_OUTPUTS = MAX_DRAFT + 1
_N_CTX = 2048  # of a draft's context; it begins anew where that is full


class Drafts:
    """The drafts of one model. Who uses it holds the model's turn; `abort` may come from any thread."""

    def __init__(
        self,
        header: GGUFHeader,
        native: NativeModel,
        params: LoadParams,
        verify_cost: Mapping[int, float] | None = None,
    ) -> None:
        """verify_cost: of evaluating so many tokens together, in plain steps, where `edgellm tune` measured it."""
        self._header, self._native, self._params = header, native, params
        self._opened: dict[Path, ModelDraft | IndexDraft] = {}
        self._contexts: list[Context] = []
        self._unusable: dict[Path, str] = {}
        self._verify_cost = verify_cost or None
        self.depth = Depth(self._verify_cost)

    def speculator(
        self, choice: DraftChoice, matcher: Matcher | None = None, *, is_repeatable: bool = False
    ) -> Speculator | None:
        """For one generation; None where nothing shall be guessed. matcher: of the answer's form, whose forced tokens
        are guessed first, unless the choice is "off". is_repeatable: the clock must not change what is checked.

        Errors, for what was named: GenerationError (this model can't take tokens back), DraftMismatch, ModelFileError.
        """
        if choice == "off":
            return None
        if reason := self.refusal():
            if choice == "auto":
                return None
            raise GenerationError(f"{reason}, so that nothing can be guessed; use draft off or auto")
        forced = [ForcedDraft(matcher)] if matcher else []
        depth = Depth(self._verify_cost, looks_at_clock=False) if is_repeatable else self.depth
        if choice == "auto":
            return Speculator([*forced, NgramDraft(), *self._partners()], depth)
        named = [choice] if choice == "ngram" else ["ngram", choice] if isinstance(choice, str | Path) else choice
        drafts = [NgramDraft() if name == "ngram" else self._open(resolve(name)) for name in named]
        return Speculator([*forced, *drafts], depth)

    def refusal(self) -> str:
        """Why this model can't use guesses; "" if it can."""
        if self._native.is_recurrent:
            return "this model's state can't be taken back token by token"
        return "n_batch is 1" if self._params.n_batch == 1 else ""

    def abort(self) -> None:
        for context in tuple(self._contexts):
            context.abort()

    def clear_abort(self) -> None:
        for context in tuple(self._contexts):
            context.clear_abort()

    def close(self) -> None:
        for context in self._contexts:
            context.close()
            context.model.close()
        self._contexts.clear()
        for draft in self._opened.values():
            if isinstance(draft, IndexDraft):
                draft.close()
        self._opened.clear()

    @cached_property
    def _partner_files(self) -> list[Path]:
        return partner_files(self._header)

    def _partners(self) -> list[Draft]:
        """Those the model's file or card names, as far as they are here and fit."""
        partners: list[Draft] = []
        for path in self._partner_files:
            if path in self._unusable:
                continue
            try:
                partners.append(self._open(path))
            except EdgeLLMError as exc:
                self._unusable[path] = str(exc)
                logger.warning("the draft %s isn't used: %s", path, exc)
        return partners

    def _open(self, path: Path) -> Draft:
        path = path.resolve()
        if path not in self._opened:
            index = is_index(path)  # by what the file holds, not by its name
            self._opened[path] = IndexDraft(path, self._header) if index else self._open_model(path)
        return self._opened[path]

    def _open_model(self, path: Path) -> ModelDraft:
        header = check_loadable(path)
        check_same_vocabulary(self._header, header)
        native = NativeModel(path, load_mode=self._params.load_mode, n_gpu_layers=self._params.n_gpu_layers)
        with contextlib.ExitStack() as stack:
            stack.callback(native.close)
            if native.is_recurrent or native.is_embedder:
                raise DraftMismatch(f"{path.name} can't be a draft: it isn't a plain text model with attention")
            params = LoadParams(
                n_ctx=min(_N_CTX, self._params.n_ctx or _N_CTX),
                n_batch=self._params.n_batch,
                n_threads=self._params.n_threads,
                flash_attn=self._params.flash_attn,
                n_gpu_layers=self._params.n_gpu_layers,
            )
            context = Context(native, params)
            stack.pop_all()
        self._contexts.append(context)
        return ModelDraft(path.name, context)


def partner_files(header: GGUFHeader) -> list[Path]:
    """The drafts that the model's metadata, a note about it or its card names, if they are there; indices first."""
    paths = partners_of(header)
    card = card_for(header.path)
    if card and card.draft:
        with contextlib.suppress(EdgeLLMError):
            paths.append(resolve(card.draft))
    return sorted((path for path in paths if path.is_file()), key=lambda path: not is_index(path))


def use_by_default(model: Path, draft: Path, used: bool) -> str:
    """Make `draft` the model's by default, beside one of the other kind (index, model), or see that it isn't.

    Returns where that is written, in words. Errors: ModelFileError, OutputError.
    """
    header = read_header(model)
    known = partners_of(header)
    others = [path for path in known if path.resolve() != draft.resolve()]
    if used:
        others = [path for path in others if path.is_file() and is_index(path) != is_index(draft)]
        return set_partners(header, [*others, draft])
    return set_partners(header, others) if len(others) < len(known) else "nowhere"

"""Which drafts a model's generations use: what was asked for, opened when first used, kept until the model closes."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

from edgellm.catalog.cards import card_for, resolve
from edgellm.config import LoadParams
from edgellm.constraint import Matcher
from edgellm.errors import DraftMismatch, EdgeLLMError, GenerationError
from edgellm.gguf_header import GGUFHeader, check_loadable
from edgellm.native.context import Context
from edgellm.native.model import NativeModel
from edgellm.speculation.depth import MAX_DRAFT, Depth
from edgellm.speculation.drafts import Draft, DraftChoice, ForcedDraft, NgramDraft
from edgellm.speculation.model_draft import ModelDraft, check_same_vocabulary
from edgellm.speculation.verify import Speculator

logger = logging.getLogger(__name__)

PARTNER_KEY = "edgellm.draft"  # of a GGUF: the file of its draft, from the model's own folder on
N_OUTPUTS = MAX_DRAFT + 1
_N_CTX = 2048  # of a draft's context; it begins anew where that is full


class Drafts:
    """The drafts of one model. Who uses it holds the model's turn; `abort` may come from any thread."""

    def __init__(self, header: GGUFHeader, native: NativeModel, params: LoadParams) -> None:
        self._header, self._native, self._params = header, native, params
        self._opened: dict[Path, ModelDraft] = {}
        self._contexts: list[Context] = []
        self._unusable: dict[Path, str] = {}
        self.depth = Depth()

    def speculator(self, choice: DraftChoice, matcher: Matcher | None = None) -> Speculator | None:
        """For one generation; None where nothing shall be guessed. matcher: of the answer's form, whose forced tokens
        are guessed first, unless the choice is "off".

        Errors, for what was named: GenerationError (this model can't take tokens back), DraftMismatch, ModelFileError.
        """
        if choice == "off":
            return None
        if reason := self.refusal():
            if choice == "auto":
                return None
            raise GenerationError(f"{reason}, so that nothing can be guessed; use draft off or auto")
        forced = [ForcedDraft(matcher)] if matcher else []
        if choice == "auto":
            return Speculator([*forced, NgramDraft(), *self._partners()], self.depth)
        named = [choice] if choice == "ngram" else ["ngram", choice] if isinstance(choice, str | Path) else choice
        drafts = [NgramDraft() if name == "ngram" else self._open(resolve(name)) for name in named]
        return Speculator([*forced, *drafts], self.depth)

    def refusal(self) -> str:
        """Why this model can't use guesses; "" if it can."""
        if self._native.is_recurrent:
            return "this model's state can't be taken back token by token"
        return "" if self._params.n_batch > 1 else "n_batch is 1"

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
        self._opened.clear()

    def _partners(self) -> list[Draft]:
        """Those the model's file or card names, as far as they are here and fit."""
        partners: list[Draft] = []
        for path in partner_files(self._header):
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
            self._opened[path] = ModelDraft(path.name, context)
        return self._opened[path]


def partner_files(header: GGUFHeader) -> list[Path]:
    """The drafts that the model's metadata or its card names, if they are there."""
    named = header.metadata.get(PARTNER_KEY, [])
    paths = [header.path.parent / str(name) for name in ([named] if isinstance(named, str) else named)]
    card = card_for(header.path)
    if card and card.draft:
        with contextlib.suppress(EdgeLLMError):
            paths.append(resolve(card.draft))
    return [path for path in paths if path.is_file()]

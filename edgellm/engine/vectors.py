"""Logits and embeddings: numbers for whole texts, from contexts of their own, so that a chat isn't disturbed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from edgellm.errors import ContextFull, GenerationError
from edgellm.text import plain_ids

if TYPE_CHECKING:
    import numpy as np

    from edgellm.engine.resources import Resources

    FloatMatrix = np.ndarray[Any, np.dtype[np.float32]]

_LOGIT_ROWS = 64  # positions whose logits are computed together: 64 × 150,000 floats are 38 MB


def logits(held: Resources, tokens: Sequence[int]) -> FloatMatrix:
    """As `Model.logits`."""
    _check_fits_training(held, len(tokens))
    with held.side_context(n_ctx=max(1, len(tokens)), n_outputs=_LOGIT_ROWS) as context:
        return context.logits(plain_ids(tokens))


def embed(held: Resources, texts: str | Sequence[str]) -> FloatMatrix:
    """As `Model.embed`."""
    import numpy as np

    held.check_open()
    texts = [texts] if isinstance(texts, str) else texts
    if not texts or not all(texts):
        raise GenerationError("there is nothing to embed; give one or more texts, none of them empty")
    rows = [held.native.vocab.tokenize(text, special=False, framed=True) for text in texts]
    longest = max(map(len, rows))
    _check_fits_training(held, longest)
    with held.side_context(n_ctx=longest, n_batch=longest, n_outputs=longest, embeddings=True) as context:
        matrix = np.stack([context.embedding(row) for row in rows])
    norms = np.linalg.norm(matrix, axis=1, keepdims=True)
    return np.asarray(matrix / np.maximum(norms, 1e-12), np.float32)


def _check_fits_training(held: Resources, n_tokens: int) -> None:
    held.check_open()
    limit = held.native.n_ctx_train
    if 0 < limit < n_tokens:
        raise ContextFull(f"{n_tokens} tokens, but the model was trained with a context of {limit}; shorten the text")

"""Answers of a given form: JSON of a schema, a regular expression, a Lark grammar, all through llguidance.

What may follow is asked for one token at a time; see https://github.com/guidance-ai/llguidance for the grammars.
llguidance is imported when the first answer needs it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgellm.config import SamplingParams
from edgellm.errors import GenerationError

if TYPE_CHECKING:
    import numpy as np

    Mask = np.ndarray[Any, np.dtype[np.bool_]]

# One way to write JSON: models know it, and everything between the values is forced and so costs next to nothing.
_JSON = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Matcher:
    """How far an answer is in its grammar. A token that was taken stays taken."""

    def __init__(self, tokenizer: Any, grammar: str) -> None:
        """tokenizer: `native.grammar.grammar_tokenizer`. GenerationError where the grammar can't be used."""
        from llguidance import LLMatcher

        self._matcher = LLMatcher(tokenizer, grammar, log_level=0)
        self._n_vocab: int = tokenizer.vocab_size
        self._check()

    def allows(self, token: int) -> bool:
        return bool(self._matcher.validate_tokens([token]) == 1)

    def take(self, token: int) -> None:
        """Go on behind the token. GenerationError if it isn't allowed."""
        self._matcher.consume_token(token)
        self._check()

    def mask(self) -> Mask:
        """Which tokens may follow: bool (n_vocab,)."""
        import numpy as np

        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        return np.unpackbits(bits, bitorder="little")[: self._n_vocab].astype(bool)

    def forced(self) -> list[int]:
        """The tokens that must follow, as the model would most likely spell them; often none."""
        return list(self._matcher.compute_ff_tokens())

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = " ".join(str(self._matcher.get_error()).split())
            raise GenerationError(f"the answer's form can't be used: {reason[:300]}; simplify the schema or grammar")


def grammar_of(params: SamplingParams) -> str:
    """llguidance's grammar for the form the parameters ask for. GenerationError: the schema is none."""
    from llguidance import LLMatcher

    if params.schema is not None:
        return str(LLMatcher.grammar_from_json_schema(schema_text(params.schema), overrides=_JSON))
    if params.regex is not None:
        return str(LLMatcher.grammar_from_regex(params.regex))
    return str(LLMatcher.grammar_from_lark(params.lark))


def schema_text(schema: Any) -> str:
    """A JSON Schema as text: of a mapping, of text, or of a Pydantic model. GenerationError for anything else."""
    if hasattr(schema, "model_json_schema"):
        schema = schema.model_json_schema()
    if isinstance(schema, str | bytes):
        try:
            schema = json.loads(schema)
        except ValueError as exc:
            raise GenerationError(f"the schema is not JSON: {exc}") from exc
    if not isinstance(schema, Mapping | bool):
        kind = "a list" if isinstance(schema, Sequence) else type(schema).__name__
        raise GenerationError(f"a schema is a JSON object, not {kind}")
    try:
        return json.dumps(schema)
    except (TypeError, ValueError, RecursionError) as exc:
        raise GenerationError(f"the schema can't be written as JSON: {exc}") from exc

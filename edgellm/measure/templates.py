"""Two chat templates compared by the prompts they render."""

from __future__ import annotations

from edgellm.chat.template import ChatTemplate
from edgellm.errors import GenerationError

_MESSAGES = (
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi there.\n\nHow are you?"},
    {"role": "user", "content": "  Fine <b>thanks</b>, {{ and }} you?"},
)


def same_prompts(first: str, second: str) -> bool:
    """Whether both give the same prompt, or the same refusal, for dialogues of one to three messages."""
    return all(_prompt(first, n) == _prompt(second, n) for n in range(1, len(_MESSAGES) + 1))


def _prompt(source: str, n: int) -> tuple[str, str]:
    try:
        return "prompt", ChatTemplate(source).render(_MESSAGES[:n])
    except GenerationError as exc:
        return "refused", str(exc)

"""What an answer is read for: calls of tools, and thinking that is marked otherwise than by tags."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from edgellm.chat.channels import Channels, Translation, find_channels, translated
from edgellm.config import SamplingParams
from edgellm.generation import GenerationResponse

if TYPE_CHECKING:
    from edgellm.chat.tool_schema import Schema, Tool
    from edgellm.chat.tools import Tokenize


class AnswerForm:
    """Of one request's answer. GenerationError: bad tools, or a template without a known form of calls."""

    def __init__(self, template: str, tools: Sequence[Tool], tool_choice: str, tokenize: Tokenize) -> None:
        self._channels = find_channels(template)
        self._toolbox = None
        if tools and tool_choice != "none":
            from edgellm.chat.tools import Toolbox

            self._toolbox = Toolbox(tools, tool_choice, template, tokenize)

    @property
    def schemas(self) -> list[Schema]:
        return self._toolbox.schemas if self._toolbox else []

    def params(self, params: SamplingParams | None) -> SamplingParams | None:
        """With the control tokens that must be seen, and for a call that must come, its grammar."""
        if self._toolbox:
            params = self._toolbox.params(params)
        return _shown(params, self._channels)

    def read(self, responses: Generator[GenerationResponse, None, None]) -> Generator[GenerationResponse, None, None]:
        """The responses with calls taken out of the text, and thinking between `<think>` and `</think>`."""
        if self._toolbox:
            responses = self._toolbox.read(responses)
        return translated(responses, self._channels) if self._channels else responses


def with_marks(params: SamplingParams, template: str) -> SamplingParams:
    """With the control tokens seen that `read_whole` needs."""
    return _shown(params, find_channels(template)) or params


def _shown(params: SamplingParams | None, channels: Channels | None) -> SamplingParams | None:
    if channels is None:
        return params
    params = params or SamplingParams()
    return replace(params, shown_tokens=tuple(dict.fromkeys((*params.shown_tokens, *channels.tokens))))


def read_whole(text: str, template: str) -> str:
    """An answer that came as a whole, its thinking between `<think>` and `</think>`."""
    channels = find_channels(template)
    if channels is None:
        return text
    translation = Translation(channels)
    return translation.add(text) + translation.flush()

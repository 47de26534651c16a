"""Let a model call Python functions until it answers.

    from edgellm.tools import run_tools

    def weather(city: str) -> str:
        "The weather in a city."
        return "sunny"

    done = run_tools(model, [{"role": "user", "content": "How is the weather in Rome?"}], [weather])
    print(done.text)

The functions run in this process with what the model wrote as arguments: give it none that mustn't be called so.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from edgellm.chat.conversation import ResponseStream
from edgellm.chat.tool_schema import tool_schema
from edgellm.config import SamplingParams
from edgellm.errors import GenerationError
from edgellm.generation import GenerationResponse

Message = dict[str, Any]


class ToolModel(Protocol):
    """What the loop needs of a model (`engine.model.Model`)."""

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Callable[..., object]],
        tool_choice: str,
    ) -> ResponseStream: ...


@dataclass(frozen=True)
class ToolRun:
    """text: the last answer's. messages: all new ones, to go on with. finished: False where the rounds were used up."""

    text: str
    messages: list[Message]
    finished: bool


def run_tools(
    model: ToolModel,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Callable[..., object]],
    params: SamplingParams | None = None,
    *,
    max_rounds: int = 8,
    tool_choice: str = "auto",
    on_response: Callable[[GenerationResponse], object] | None = None,
) -> ToolRun:
    """Answer, call what the answer asks for, give the results back, until an answer asks for nothing.

    What a function returns is given to the model as it is if it is text, else as JSON; an exception is given to it as
    its message. tool_choice: of the first round, as in `Model.chat`. on_response: sees every piece of every answer.
    Errors: as `Model.chat`.
    """
    functions = {tool_schema(tool)["function"]["name"]: tool for tool in tools if callable(tool)}
    if len(functions) < len(tools):
        raise GenerationError("run_tools takes functions of different names; for schemas use model.chat(tools=…)")
    made: list[Message] = []
    text = ""
    for i in range(max(1, max_rounds)):
        choice = tool_choice if i == 0 else "auto"
        stream = model.chat([*messages, *made], params, tools=tools, tool_choice=choice)
        text, calls = _answer(stream, on_response)
        made.append({"role": "assistant", "content": text, **({"tool_calls": calls} if calls else {})})
        if not calls:
            return ToolRun(text, made, finished=True)
        made += [_result(call, functions) for call in calls]
    return ToolRun(text, made, finished=False)


def _answer(
    stream: ResponseStream, on_response: Callable[[GenerationResponse], object] | None
) -> tuple[str, list[Message]]:
    text: list[str] = []
    calls: list[Message] = []
    try:
        for response in stream:
            text.append(response.text)
            calls += [dict(call) for call in response.tool_calls]
            if on_response is not None:
                on_response(response)
    finally:
        stream.close()
    return "".join(text), calls


def _result(call: Message, functions: Mapping[str, Callable[..., object]]) -> Message:
    """The message that answers a call; what goes wrong in the function is for the model to read."""
    name = call["function"]["name"]
    content = f"error: there is no tool {name!r}; there are {', '.join(functions)}"
    if name in functions:
        try:
            arguments = json.loads(call["function"]["arguments"])
            inspect.signature(functions[name]).bind(**arguments)
            result = functions[name](**arguments)
            content = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)
        except Exception as exc:
            content = f"error: {type(exc).__name__}: {exc}"
    return {"role": "tool", "tool_call_id": call["id"], "name": name, "content": content}

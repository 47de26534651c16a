"""edgellm: turn your fine-tune into a small GGUF, and run it on your own machine.

    import edgellm

    with edgellm.load("model.gguf") as model:
        for chunk in model.chat([{"role": "user", "content": "Hello"}]):
            print(chunk.text, end="")

Importing this module loads no native code and no numpy; the names below are imported when first used.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgellm.chat.conversation import Conversation
    from edgellm.config import LoadParams, SamplingParams
    from edgellm.engine.model import Model, load
    from edgellm.engine.process import freeze_support
    from edgellm.engine.stream import Completion
    from edgellm.errors import (
        AdapterError,
        BudgetError,
        Cancelled,
        CheckpointError,
        ContextFull,
        DraftMismatch,
        EdgeLLMError,
        EngineCrashed,
        GenerationError,
        ModelFileError,
        OutputError,
        SessionError,
        TextError,
        TokenizerError,
        UnsupportedArchitecture,
    )
    from edgellm.generation import GenerationResponse, GenerationStats

__version__ = "0.1.0"

_HOMES = {
    "edgellm.chat.conversation": ("Conversation",),
    "edgellm.config": ("LoadParams", "SamplingParams"),
    "edgellm.engine.model": ("Model", "load"),
    "edgellm.engine.process": ("freeze_support",),
    "edgellm.engine.stream": ("Completion",),
    "edgellm.errors": (
        "AdapterError",
        "BudgetError",
        "Cancelled",
        "CheckpointError",
        "ContextFull",
        "DraftMismatch",
        "EdgeLLMError",
        "EngineCrashed",
        "GenerationError",
        "ModelFileError",
        "OutputError",
        "SessionError",
        "TextError",
        "TokenizerError",
        "UnsupportedArchitecture",
    ),
    "edgellm.generation": ("GenerationResponse", "GenerationStats"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [  # noqa: RUF022 - in the order of the reader's interest
    "__version__",
    "load",
    "Model",
    "Conversation",
    "LoadParams",
    "SamplingParams",
    "Completion",
    "GenerationResponse",
    "GenerationStats",
    "EdgeLLMError",
    "ModelFileError",
    "CheckpointError",
    "UnsupportedArchitecture",
    "TokenizerError",
    "AdapterError",
    "TextError",
    "OutputError",
    "BudgetError",
    "GenerationError",
    "ContextFull",
    "Cancelled",
    "DraftMismatch",
    "SessionError",
    "EngineCrashed",
    "freeze_support",
]

# A library must not write to stderr: without a handler here, Python's last-resort handler would.
logging.getLogger("edgellm").addHandler(logging.NullHandler())


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'edgellm' has no attribute {name!r}")
    value: object = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

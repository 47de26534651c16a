"""Every error edgellm raises on purpose.

    EdgeLLMError
    ├─ ModelFileError            damaged, truncated or unsupported GGUF
    ├─ CheckpointError           missing shard, leftover or unknown tensor, non-finite value, unsafe pickle
    │  ├─ UnsupportedArchitecture
    │  ├─ TokenizerError
    │  └─ AdapterError
    ├─ TextError                 a text or dialogues to measure on can't be read, or are too short
    ├─ OutputError               the result cannot be written there: exists, no permission, disk full
    ├─ BudgetError               a size, quality or speed budget cannot be met
    ├─ GenerationError
    │  ├─ ContextFull
    │  └─ Cancelled
    ├─ DraftMismatch             a draft model does not share the target's vocabulary
    ├─ SessionError              a saved session cannot be used
    └─ EngineCrashed             the child process that held the engine died

Each message is one line that says what was found, where, and what to do about it. `exit_code` is what the
command line exits with: 1 failed, 3 bad input file, 4 budget unreachable, 130 cancelled.
"""

from __future__ import annotations


class EdgeLLMError(Exception):
    """Base class: `except EdgeLLMError` catches everything edgellm raises on purpose."""

    exit_code = 1


class ModelFileError(EdgeLLMError):
    """A GGUF file is damaged, truncated, or needs something this llama.cpp lacks."""

    exit_code = 3


class CheckpointError(EdgeLLMError):
    """A checkpoint can't be converted: missing shard, unknown tensor, non-finite value, unsafe pickle …"""

    exit_code = 3


class UnsupportedArchitecture(CheckpointError):
    """No converter for this model family; the message lists those that exist."""


class TokenizerError(CheckpointError):
    """The tokenizer is missing, or of a kind that can't be carried over faithfully."""


class AdapterError(CheckpointError):
    """An adapter doesn't fit its base or can't be merged; the message names the tensor."""


class TextError(EdgeLLMError):
    """A text or a file of dialogues can't be read, is too short, or has a line that isn't one."""

    exit_code = 3


class OutputError(EdgeLLMError):
    """The result can't be written: the path exists, is not writable, or the disk is full."""


class BudgetError(EdgeLLMError):
    """A budget can't be met; the message gives the nearest that can."""

    exit_code = 4


class GenerationError(EdgeLLMError):
    """Generation can't start or go on (bad tokens, a busy model, a failed decode)."""


class ContextFull(GenerationError):
    """The prompt, or prompt and answer together, need more than n_ctx tokens."""


class Cancelled(GenerationError):
    """Load or prefill was cancelled before any text came."""

    exit_code = 130


class DraftMismatch(EdgeLLMError):
    """The draft model's vocabulary isn't the target's; the message names the first differing token."""

    exit_code = 3


class SessionError(EdgeLLMError):
    """A session file is damaged, stale, or belongs to another model."""

    exit_code = 3


class EngineCrashed(EdgeLLMError):
    """The child process that held the engine died; the message says how. The next call starts another one."""

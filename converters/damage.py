"""The last line of defence against damaged inputs: what their readers don't check entry by entry."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgellm.errors import CheckpointError, EdgeLLMError

_LONGEST = 160


@contextmanager
def blamed_on(path: Path, error: type[CheckpointError] = CheckpointError, *, foreign: bool = False) -> Iterator[None]:
    """Turns what Python raises over a text where a number belongs, a list that is too short … into `error`.

    foreign: a library's own exceptions too; those of compiled ones needn't derive from Exception.
    """
    try:
        yield
    except (EdgeLLMError, KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except OSError as exc:
        raise error(f"cannot read {path}: {exc.strerror or exc}") from exc
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError) as exc:
        raise error(_message(path, exc)) from exc
    except BaseException as exc:
        if not foreign:
            raise
        raise error(_message(path, exc)) from exc


def _message(path: Path, exc: BaseException) -> str:
    said = " ".join(str(exc).split()) or type(exc).__name__
    return f"{path} is damaged ({said[:_LONGEST].encode('utf-8', 'replace').decode()}); copy it again"

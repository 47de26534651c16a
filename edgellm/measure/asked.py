"""Asks a module that runs as a process of its own: one JSON object on its stdin, one on its stdout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from edgellm.errors import EdgeLLMError, EngineCrashed


def ask_child(module: str, request: Mapping[str, Any], what: str, failure: type[EdgeLLMError]) -> Any:
    """The answer of `python -m module`. what: is measured there, for messages.

    Raises `failure` with the last line of the child's stderr where it fails, EngineCrashed where it is killed (memory).
    """
    child = subprocess.run(
        [sys.executable, "-m", module],
        input=json.dumps(request).encode(),
        capture_output=True,
        env={**os.environ, "GGML_NO_BACKTRACE": "1"},
        check=False,
    )
    if child.returncode < 0:
        raise EngineCrashed(f"the measuring process was killed by signal {-child.returncode}; is there enough memory?")
    if child.returncode != 0:
        lines = child.stderr.decode("utf-8", "replace").strip().splitlines() or [f"code {child.returncode}"]
        raise failure(f"{what} can't be measured: {lines[-1].removeprefix('error: ')[:300]}")
    return json.loads(child.stdout)

"""Runs cases one after the other and says after each how it ended, for the parent to watch.

python -m tests.fuzz.worker ROOT WORK SEED FIRST STEP END
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any

MEMORY = 1 << 30  # bytes a case may take beyond what the process has
_LOADER = """
import sys
from pathlib import Path
import edgellm
from edgellm.errors import EdgeLLMError
for line in sys.stdin:
    try:
        with edgellm.load(Path(line.strip()), edgellm.LoadParams(n_ctx=64, n_threads=1)) as model:
            model.complete("Once upon", edgellm.SamplingParams(max_tokens=2))
        print("loaded", flush=True)
    except EdgeLLMError:
        print("refused", flush=True)
"""


class Loader:
    """A process that loads GGUFs; its death is a defect of ours."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[str] | None = None

    def __call__(self, path: Path) -> None:
        if self._child is None:
            self._child = subprocess.Popen(
                [sys.executable, "-c", _LOADER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                stderr=subprocess.PIPE, env={**os.environ, "GGML_NO_BACKTRACE": "1"},
            )  # fmt: skip
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(f"{path}\n")
        self._child.stdin.flush()
        if self._child.stdout.readline().strip() not in ("loaded", "refused"):
            assert self._child.stderr is not None
            child, self._child = self._child, None
            said = child.stderr.read()[-1500:] if child.stderr else ""
            raise AssertionError(f"loading killed the process ({child.wait()}): {said}")


def run(root: Path, work: Path, seed: int, number: int, load: Loader) -> str:
    """How one case ends: "ok", "refused", or a traceback."""
    from edgellm.errors import EdgeLLMError
    from tests.fuzz.targets import act, prepare

    try:
        target, folder = prepare(root, seed, number, work)
        act(target, folder, root / "llama", load)
    except EdgeLLMError as exc:
        said = str(exc)
        return "refused" if said and "\n" not in said else f"a refusal in several lines, or none: {said!r}"
    except BaseException:  # a panic of the tokenizers library is no Exception
        return traceback.format_exc()
    return "ok"


def main() -> None:
    root, work = Path(sys.argv[1]), Path(sys.argv[2])
    seed, first, step, end = map(int, sys.argv[3:])
    import torch  # noqa: F401

    import converters  # noqa: F401  (before the limit: what it takes is no case's fault)

    warnings.simplefilter("ignore")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
    load = Loader()
    out = os.fdopen(os.dup(1), "w", buffering=1)
    with tempfile.TemporaryFile() as swallowed, contextlib.ExitStack():
        os.dup2(swallowed.fileno(), 1)
        for number in range(first, end, step):
            out.write(json.dumps({"begin": number}) + "\n")
            outcome: Any = run(root, work, seed, number, load)
            out.write(json.dumps({"number": number, "outcome": outcome}) + "\n")


if __name__ == "__main__":
    main()

"""The memory of a process that has a model loaded and has used it: `python -m edgellm.measure.footprint`.

In a process of its own, for nothing else shall be in it. One JSON object on stdin (see `footprint`), one on stdout.
"""

from __future__ import annotations

import json
import sys
from contextlib import closing, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgellm.config import LoadParams, SamplingParams
from edgellm.errors import EdgeLLMError, GenerationError
from edgellm.measure.asked import ask_child

_PROMPT = [7919 * i % 997 for i in range(1, 257)]  # token ids that every vocabulary has
_N_WRITTEN = 8


def footprint(path: Path, params: LoadParams, *, peer: bool = False) -> dict[str, int]:
    """Bytes after a short answer. peak: the most that was resident. On Linux also rss, pss (shared pages counted in
    parts), file (of rss: pages of files, which processes share and the system may drop) and anonymous (its own).

    peer: of a process with `llama_cpp.Llama` instead. Errors: GenerationError, EngineCrashed.
    """
    request = {"path": str(path), "params": asdict(params), "peer": peer}
    what = f"the memory of {path.name}"
    found: dict[str, int] = ask_child("edgellm.measure.footprint", request, what, GenerationError)
    return found


def memory_of_this_process() -> dict[str, int]:
    """See `footprint`; empty where the system tells nothing."""
    found: dict[str, int] = {}
    with suppress(ImportError):  # Windows
        import resource

        # Linux reports kilobytes, macOS bytes
        unit = 1 if sys.platform == "darwin" else 1024
        found["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    names = {"VmRSS": "rss", "RssFile": "file", "RssAnon": "anonymous", "Pss": "pss"}
    for file in ("/proc/self/status", "/proc/self/smaps_rollup"):
        with suppress(OSError, ValueError):
            for line in Path(file).read_text(encoding="ascii", errors="replace").splitlines():
                key, _, rest = line.partition(":")
                if key in names:
                    found[names[key]] = int(rest.split()[0]) * 1024
    return found


def _main() -> None:
    request: dict[str, Any] = json.loads(sys.stdin.buffer.read())
    path, params = Path(request["path"]), LoadParams(**request["params"])
    try:
        found = _of_peer(path, params) if request["peer"] else _of_ours(path, params)
    except EdgeLLMError as exc:
        raise SystemExit(f"error: {exc}") from exc
    print(json.dumps(found))


def _of_ours(path: Path, params: LoadParams) -> dict[str, int]:
    from edgellm.engine.model import load

    with load(path, params) as model:
        model.complete(_PROMPT, SamplingParams(max_tokens=_N_WRITTEN), draft="off")
        return memory_of_this_process()


def _of_peer(path: Path, params: LoadParams) -> dict[str, int]:
    from edgellm.config import DEFAULT_N_BATCH, physical_cpu_count
    from edgellm.native.peer import Peer

    n_threads = params.n_threads or physical_cpu_count()
    n_batch = params.n_batch or DEFAULT_N_BATCH
    with closing(Peer(path, n_ctx=params.n_ctx, n_threads=n_threads, n_batch=n_batch)) as peer:
        for _ in peer.stream(_PROMPT, _N_WRITTEN):
            pass
        return memory_of_this_process()


if __name__ == "__main__":
    _main()

"""A small desktop chat: pick a model, ask, watch the answer come, stop it. Nothing but Tk and edgellm.

    python examples/desktop_tk.py [MODEL]

How to embed a model in a desktop app, in short: one thread works with the model (`Engine`), the window only sends it
requests and takes events out of a queue from time to time, so that it never freezes. `cancel()` may be called from
the window's thread at any moment, also while a model loads or a long prompt is read. An engine in a process of its own
(`ENGINE`) can't take the window down with it: its end is an event like others, and the conversation goes on.
"""

from __future__ import annotations

import queue
import sys
import threading
import tkinter as tk
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tkinter import ttk
from typing import Any

import edgellm
from edgellm.catalog.discover import find_stores
from edgellm.engine.listing import list_models

ENGINE: dict[str, Any] = {"isolated": True}  # of edgellm.load
SAMPLING = edgellm.SamplingParams(temperature=0.7, max_tokens=1024)
POLL_MS = 30


@dataclass(frozen=True)
class Event:
    """kind: loading and reading (fraction), ready, text, done, failed, crashed (text)."""

    kind: str
    text: str = ""
    fraction: float = 0.0


class Engine:
    """One thread that loads models and answers. Methods return at once; what comes of them is in `events`."""

    def __init__(self, load: Callable[..., Any] = edgellm.load) -> None:
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._requests: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._load = load
        self._model: Any = None
        self._conversation: edgellm.Conversation | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def load(self, path: str | Path) -> None:
        """Use another model; what was said goes on with it."""
        self._request(lambda: self._do_load(path))

    def ask(self, text: str) -> None:
        self._request(lambda: self._do_ask(text))

    def stop(self) -> None:
        """End what it is doing, at once; of an answer, what came is kept."""
        self._stopped.set()
        if self._model is not None:
            self._model.cancel()

    def close(self) -> None:
        """End it all, and wait for it."""
        self.stop()
        self._requests.put(None)
        self._thread.join()

    def _request(self, do: Callable[[], None]) -> None:
        self._stopped.clear()
        self._requests.put(do)

    def _work(self) -> None:
        while (do := self._requests.get()) is not None:
            try:
                do()
            except edgellm.EngineCrashed as exc:
                self.events.put(Event("crashed", f"{exc}. Ask again: it starts anew, and the conversation is kept."))
            except edgellm.Cancelled:
                self.events.put(Event("done", "stopped"))
            except edgellm.EdgeLLMError as exc:
                self.events.put(Event("failed", str(exc)))
        if self._model is not None:
            self._model.close()

    def _do_load(self, path: str | Path) -> None:
        messages = self._conversation.messages if self._conversation else []
        if self._model is not None:
            self._model.close()
            self._model = self._conversation = None
        self._model = self._load(path, on_progress=self._progress("loading"), **ENGINE)
        self._conversation = edgellm.Conversation(self._model)
        self._conversation.messages = messages
        self.events.put(Event("ready", str(path)))

    def _do_ask(self, text: str) -> None:
        if self._conversation is None:
            raise edgellm.GenerationError("no model is loaded; pick one above")
        end = "stopped"
        for response in self._conversation.say(text, SAMPLING, on_progress=self._progress("reading")):
            self.events.put(Event("text", response.text))
            end = f"{response.finish_reason}, {response.stats.decode_tokens_per_second:.0f} tokens/s"
        self.events.put(Event("done", end))  # now the conversation holds the answer

    def _progress(self, kind: str) -> Callable[[float], bool]:
        """Reports, and cancels by returning False once `stop` was called."""

        def report(fraction: float) -> bool:
            self.events.put(Event(kind, fraction=fraction))
            return not self._stopped.is_set()

        return report


class Window:
    """Shows an engine's events and sends it what is typed."""

    def __init__(self, root: tk.Tk, engine: Engine, models: dict[str, Path]) -> None:
        """models: by the names to pick them by."""
        self.root, self.engine, self.models = root, engine, models
        root.title("edgellm")
        root.geometry("760x520")
        root.columnconfigure(0, weight=1)
        root.rowconfigure(1, weight=1)
        root.protocol("WM_DELETE_WINDOW", self.close)
        self._build()
        self.is_busy = False
        self._poll_id = root.after(POLL_MS, self._poll)

    def _build(self) -> None:
        top = ttk.Frame(self.root, padding=8)
        top.grid(sticky="ew")
        top.columnconfigure(0, weight=1)
        self.picker = ttk.Combobox(top, values=list(self.models), state="readonly")
        self.picker.grid(row=0, column=0, sticky="ew")
        self.picker.bind("<<ComboboxSelected>>", lambda _: self.pick(self.picker.get()))
        self.progress = ttk.Progressbar(top, maximum=1.0, length=160)
        self.progress.grid(row=0, column=1, padx=(8, 0))
        self.text = tk.Text(self.root, wrap="word", state="disabled", padx=10, pady=10)
        self.text.grid(sticky="nsew")
        self.text.tag_configure("user", foreground="#1a5fb4")
        self.text.tag_configure("note", foreground="#77767b")
        bottom = ttk.Frame(self.root, padding=8)
        bottom.grid(sticky="ew")
        bottom.columnconfigure(0, weight=1)
        self.entry = ttk.Entry(bottom)
        self.entry.grid(row=0, column=0, sticky="ew")
        self.entry.bind("<Return>", lambda _: self.send())
        self.send_button = ttk.Button(bottom, text="Send", command=self.send)
        self.send_button.grid(row=0, column=1, padx=8)
        self.stop_button = ttk.Button(bottom, text="Stop", command=self.engine.stop, state="disabled")
        self.stop_button.grid(row=0, column=2)
        self.status = ttk.Label(self.root, padding=(8, 0, 8, 8), text="Pick a model.")
        self.status.grid(sticky="ew")

    def pick(self, name: str) -> None:
        self.picker.set(name)
        self._begin(f"loading {name}")
        self.engine.load(self.models[name])

    def send(self) -> None:
        text = self.entry.get().strip()
        if not text or self.is_busy:
            return
        self.entry.delete(0, "end")
        self._write(f"\n{text}\n\n", "user")
        self._begin("thinking")
        self.engine.ask(text)

    def close(self) -> None:
        self.root.after_cancel(self._poll_id)
        self.engine.close()
        self.root.destroy()

    def _begin(self, status: str) -> None:
        self.status["text"] = status
        self._set_busy(True)

    def _set_busy(self, busy: bool) -> None:
        self.is_busy = busy
        self.send_button["state"] = "disabled" if busy else "normal"
        self.stop_button["state"] = "normal" if busy else "disabled"

    def _poll(self) -> None:
        self._poll_id = self.root.after(POLL_MS, self._poll)  # first: a text that Tk refuses mustn't end the polling
        while not self.engine.events.empty():
            self.show(self.engine.events.get())

    def show(self, event: Event) -> None:
        """One event of the engine's."""
        if event.kind in ("loading", "reading"):
            self.progress["value"] = event.fraction
            self.status["text"] = f"{event.kind} {event.fraction:.0%}"
            return
        if event.kind == "text":
            self._write(event.text)
            return
        self._set_busy(False)
        self.progress["value"] = 0
        self.status["text"] = event.text
        if event.kind in ("failed", "crashed"):
            self._write(f"\n[{event.text}]\n", "note")

    def _write(self, text: str, tag: str = "") -> None:
        self.text["state"] = "normal"
        self.text.insert("end", text, (tag,) if tag else ())
        self.text["state"] = "disabled"
        self.text.see("end")


def chat_models() -> dict[str, Path]:
    """Of this machine, those that can chat and fit in its memory, by name."""
    found = list_models(find_stores())
    return {one.name: one.path for one in found if one.is_usable and one.can_chat and one.fits and one.path}


def main() -> None:
    models = chat_models()
    if len(sys.argv) > 1:
        models = {Path(sys.argv[1]).name: Path(sys.argv[1]), **models}
    window = Window(tk.Tk(), Engine(), models)
    if models:
        window.pick(next(iter(models)))
    window.root.mainloop()


if __name__ == "__main__":
    main()

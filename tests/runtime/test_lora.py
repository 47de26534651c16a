"""Adapters at run time: their effect against merged files, switching, and files llama.cpp would abort on or ignore."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import psutil
import pytest

import edgellm
from converters import convert, export_adapter
from edgellm import AdapterError, GenerationError, LoadParams, SamplingParams
from tests.converters import tiny

EXACT = LoadParams(n_ctx=256, kv_type="f32", flash_attn=False)
TOKENS = [int(token) for token in np.random.default_rng(0).integers(3, 1000, 120)]
STORY = "Once upon a time, in a village by the sea, there lived"
GREEDY = SamplingParams(max_tokens=16)


def make_peft(model: Any, folder: Path, seed: int = 1, **options: Any) -> Any:
    import copy

    import peft
    import torch

    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**settings))
    for _, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)
    adapted.save_pretrained(folder)
    return adapted.eval()


class Tiny:
    """A random model, its F32 GGUF, and adapters of peft's for it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = tiny.make_model(folder / "base", vocab_size=1000)
        self.gguf = folder / "base.gguf"
        convert(folder / "base", self.gguf, quant="F32")

    def adapter(self, name: str, seed: int = 1, **options: Any) -> tuple[Path, Path]:
        """peft's folder, and our GGUF of it."""
        out = self.folder / f"{name}.gguf"
        if not out.exists():
            make_peft(self.model, self.folder / name, seed, **options)
            export_adapter(self.folder / "base", [(self.folder / name, 1.0)], out)
        return self.folder / name, out


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("lora"))


@pytest.fixture
def loaded(small: Tiny) -> Iterator[edgellm.Model]:
    with edgellm.load(small.gguf, EXACT) as model:
        yield model


def deviation(found: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> float:
    return float(np.abs(found - wanted).max() / wanted.std())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("plain", {}),
        ("rslora", {"use_rslora": True, "r": 8}),
        ("patterns", {"alpha_pattern": {"q_proj": 32, "layers.1.mlp.up_proj": 2}, "rank_pattern": {"v_proj": 9}}),
    ],
)
def test_logits_equal_those_of_the_merged_file(small: Tiny, tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    folder, lora = small.adapter(name, **options)
    convert(small.folder / "base", tmp_path / "merged.gguf", quant="F32", adapters=[folder])
    with edgellm.load(tmp_path / "merged.gguf", EXACT) as merged, edgellm.load(small.gguf, EXACT) as plain:
        wanted, without = merged.logits(TOKENS), plain.logits(TOKENS)
    with edgellm.load(small.gguf, EXACT, lora=[lora]) as model:
        assert deviation(model.logits(TOKENS), wanted) <= 1e-3
        assert model.lora == ((lora, 1.0),)
    assert deviation(without, wanted) > 0.1


def test_scales_and_several_adapters_add_up(small: Tiny, tmp_path: Path, loaded: edgellm.Model) -> None:
    (one, one_gguf), (two, two_gguf) = small.adapter("plain"), small.adapter("second", seed=5, r=2)
    convert(small.folder / "base", tmp_path / "merged.gguf", quant="F32", adapters=[(one, 0.5), (two, -1.5)])
    with edgellm.load(tmp_path / "merged.gguf", EXACT) as merged:
        wanted = merged.logits(TOKENS)
    loaded.set_lora((one_gguf, 0.25), (two_gguf, -1.5), (str(one_gguf), 0.25))
    assert deviation(loaded.logits(TOKENS), wanted) <= 1e-3
    assert loaded.lora == ((one_gguf, 0.5), (two_gguf, -1.5))


def test_switching_leaves_no_memory_and_the_answers_of_fresh_loads(small: Tiny) -> None:
    files = [small.adapter("plain")[1], small.adapter("second", seed=5, r=2)[1]]
    messages = [{"role": "user", "content": "Tell me a story about the sea."}]

    def answer(model: edgellm.Model) -> list[int]:
        return [t for response in model.chat(messages, GREEDY) for t in response.token_ids]

    fresh = []
    for lora in ([], [files[0]], [files[1]]):
        with edgellm.load(small.gguf, EXACT, lora=lora) as model:
            fresh.append(answer(model))
    assert len({tuple(ids) for ids in fresh}) == 3
    process = psutil.Process()
    with edgellm.load(small.gguf, EXACT) as model:
        for turn in range(60):
            if turn == 10:
                before = process.memory_info().rss
            for chosen, wanted in zip(([], [files[0]], [files[1]]), fresh, strict=True):
                model.set_lora(*chosen)
                assert answer(model) == wanted
        grown = process.memory_info().rss - before
    assert grown < 4_000_000, f"{grown} bytes in 150 switches"  # leaked adapters would be 7,000,000


def test_the_same_adapters_again_keep_what_was_read(small: Tiny, loaded: edgellm.Model) -> None:
    lora = small.adapter("plain")[1]
    loaded.set_lora(lora)
    first = loaded.complete(TOKENS, GREEDY).stats
    loaded.set_lora(lora)
    again = loaded.complete(TOKENS, GREEDY).stats
    loaded.set_lora((lora, 0.5))
    changed = loaded.complete(TOKENS, GREEDY).stats
    counts = [stats.evaluated_prompt_tokens for stats in (first, again, changed)]
    assert counts == [len(TOKENS), 1, len(TOKENS)]


def test_a_file_written_anew_is_loaded_anew(small: Tiny, tmp_path: Path, loaded: edgellm.Model) -> None:
    path = tmp_path / "adapter.gguf"
    seen = []
    for source in (small.adapter("plain")[1], small.adapter("second", seed=5, r=2)[1]):
        path.unlink(missing_ok=True)
        path.write_bytes(source.read_bytes())
        loaded.set_lora(path)
        seen.append(loaded.logits(TOKENS[:8]))
        loaded.set_lora(source)
        assert np.array_equal(loaded.logits(TOKENS[:8]), seen[-1])
    assert not np.array_equal(*seen)


def test_the_rules_of_threads_hold_for_switching(small: Tiny, loaded: edgellm.Model) -> None:
    lora = small.adapter("plain")[1]
    stream = loaded.generate(TOKENS, SamplingParams(max_tokens=200))
    next(stream)
    with pytest.raises(GenerationError, match="already has a stream open"):
        loaded.set_lora(lora)
    other = threading.Thread(target=loaded.set_lora, args=(lora,))
    other.start()
    other.join(0.2)
    assert other.is_alive()
    assert loaded.lora == ()
    stream.close()
    other.join(10)
    assert loaded.lora == ((lora, 1.0),)


def test_an_activated_lora_works_from_its_invocation_on(small: Tiny) -> None:
    import torch

    invocation = [500, 501]
    folder = small.folder / "alora"
    adapted = make_peft(small.model, folder, alora_invocation_tokens=invocation)
    lora = small.folder / "alora.gguf"
    export_adapter(small.folder / "base", [(folder, 1.0)], lora)
    tokens = [t for t in TOKENS if t not in invocation]
    prompts = [tokens[:40] + invocation + tokens[40:60], tokens[:30], tokens[:50] + invocation + tokens[50:52]]
    with edgellm.load(small.gguf, EXACT, lora=[lora]) as model:
        for prompt in prompts:
            with torch.no_grad():
                wanted = adapted(input_ids=torch.tensor([prompt])).logits[0].numpy()
            assert deviation(model.logits(prompt), wanted) <= 1e-3
        # in one memory: a later prompt that switches elsewhere reuses only what still holds
        plain = tokens[:40]
        for prompt, reused in ((plain, 0), (plain + invocation, 40), (plain + invocation + plain, 42),
                               (plain + invocation + tokens[60:70] + invocation, 40)):  # fmt: skip
            stats = model.complete(prompt, GREEDY).stats
            assert stats.prompt_tokens - stats.evaluated_prompt_tokens == reused
            with edgellm.load(small.gguf, EXACT, lora=[lora]) as fresh:
                assert model.complete(prompt, GREEDY).token_ids == fresh.complete(prompt, GREEDY).token_ids
        with pytest.raises(AdapterError, match="alone"):
            model.set_lora(lora, small.adapter("plain")[1])
        assert model.lora == ((lora, 1.0),)


Edit = Callable[[dict[str, Any], dict[str, Any]], object]  # of metadata (value, or (adder, value)) and tensors


def rewritten(source: Path, out: Path, edit: Edit) -> Path:
    reader = gguf.GGUFReader(source)
    meta: dict[str, Any] = {
        key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")
    }
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    edit(meta, tensors)
    writer = gguf.GGUFWriter(out, meta.pop("general.architecture"))
    for key, value in meta.items():
        adder, value = value if isinstance(value, tuple) else (None, value)
        by_type = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32, list: writer.add_array}
        (getattr(writer, adder) if adder else by_type[type(value)])(key, value)
    for name, data in tensors.items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


Q = "blk.0.attn_q.weight"
BAD: list[tuple[str, Edit]] = [
    ("was made for a qwen2 model", lambda meta, tensors: meta.update({"general.architecture": "qwen2"})),
    ("a model, not an adapter", lambda meta, tensors: meta.update({"general.type": "model"})),
    ("of type 'control_vector'", lambda meta, tensors: meta.update({"adapter.type": "control_vector"})),
    ("alpha is nan", lambda meta, tensors: meta.update({"adapter.lora.alpha": float("nan")})),
    ("alpha is 8", lambda meta, tensors: meta.update({"adapter.lora.alpha": ("add_uint32", 8)})),
    ("only one half", lambda meta, tensors: tensors.pop(f"{Q}.lora_b")),
    ("factors are", lambda meta, tensors: tensors.update({f"{Q}.lora_a": np.zeros((4, 96), np.float32)})),
    ("factors are", lambda meta, tensors: tensors.update({f"{Q}.lora_b": np.zeros((128, 5), np.float32)})),
    ("factors are", lambda meta, tensors: tensors.update({f"{Q}.lora_a": np.zeros((2, 4, 128), np.float32)})),
    ("has type I32", lambda meta, tensors: tensors.update({f"{Q}.lora_a": np.zeros((4, 128), np.int32)})),
    ("doesn't have", lambda meta, tensors: tensors.update(
        {f"blk.9.attn_q.weight.{x}": tensors[f"{Q}.{x}"] for x in ("lora_a", "lora_b")})),
    ("can't add at run time", lambda meta, tensors: tensors.update(
        {"blk.0.attn_norm.weight": np.ones(128, np.float32)})),
    ("aren't tokens of", lambda meta, tensors: meta.update({"adapter.alora.invocation_tokens": [5000]})),
    ("holds no tensors", lambda meta, tensors: tensors.clear()),
]  # fmt: skip


@pytest.mark.parametrize(("message", "edit"), BAD, ids=[message for message, _ in BAD])
def test_bad_adapters_are_refused_and_change_nothing(
    small: Tiny, tmp_path: Path, loaded: edgellm.Model, message: str, edit: Edit
) -> None:
    good = small.adapter("plain")[1]
    bad = rewritten(good, tmp_path / "bad.gguf", edit)
    loaded.set_lora(good)
    before = loaded.complete(TOKENS, GREEDY).token_ids
    with pytest.raises(AdapterError, match=message):
        loaded.set_lora(good, bad)
    assert loaded.lora == ((good, 1.0),)
    assert loaded.complete(TOKENS, GREEDY).token_ids == before


def test_embedding_lora_of_an_untied_model_works_and_of_a_tied_one_is_refused(small: Tiny, tmp_path: Path) -> None:
    folder, lora = small.adapter("embedding", target_modules=["embed_tokens", "q_proj"])
    convert(small.folder / "base", tmp_path / "merged.gguf", quant="F32", adapters=[folder])
    with edgellm.load(tmp_path / "merged.gguf", EXACT) as merged:
        wanted = merged.logits(TOKENS)
    with edgellm.load(small.gguf, EXACT, lora=[lora]) as model:
        assert deviation(model.logits(TOKENS), wanted) <= 1e-3
    tiny.make_model(tmp_path / "tied", vocab_size=1000, tie_word_embeddings=True)
    convert(tmp_path / "tied", tmp_path / "tied.gguf", quant="F32")
    with pytest.raises(AdapterError, match=r"token_embd\.weight.*merge it instead"):
        edgellm.load(tmp_path / "tied.gguf", lora=[lora])


def test_missing_files_folders_and_wrong_scales(small: Tiny, tmp_path: Path, loaded: edgellm.Model) -> None:
    for adapter, message in (
        (tmp_path / "none.gguf", "cannot read"),
        (small.adapter("plain")[0], "--adapter-only"),
        (small.gguf, "is a model, not an adapter"),
        ((small.adapter("plain")[1], float("nan")), "finite"),
    ):
        with pytest.raises(AdapterError, match=message):
            loaded.set_lora(adapter)
    (tmp_path / "text.gguf").write_text("no adapter")
    with pytest.raises(AdapterError, match="not a GGUF"):
        loaded.set_lora(tmp_path / "text.gguf")
    with pytest.raises(edgellm.ModelFileError, match="holds an adapter"):
        edgellm.load(small.adapter("plain")[1])


def test_an_adapter_of_the_real_model_in_its_chat(model_path: Path, tmp_path: Path) -> None:
    """The example's fine-tune: plain on a held-out sentence, gone when the adapter is."""
    adapter = Path(__file__).parents[2] / "examples" / "fine_tune" / "adapter"
    lora = tmp_path / "reminders.gguf"
    export_adapter(model_path, [(adapter, 1.0)], lora)
    messages = [{"role": "user", "content": "Remind me to feed the chickens on Saturday at 8 am"}]
    with edgellm.load(model_path, LoadParams(n_ctx=512), lora=[lora]) as model:
        answer = "".join(chunk.text for chunk in model.chat(messages, SamplingParams(max_tokens=60)))
        assert json.loads(answer) == {"task": "feed the chickens", "day": "Saturday", "time": "8 am"}
        model.set_lora()
        plain = "".join(chunk.text for chunk in model.chat(messages, SamplingParams(max_tokens=60)))
        assert "{" not in plain

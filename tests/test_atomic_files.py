"""atomic_files.py: what is written can be read, or is refused before a byte is written; nothing
is lost when the disk is full.
"""
import argparse
import errno
import io
import json
import math
import resource
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import build, tiny
from unimod_mini import (ByteText, ModelConfig, Palette, Plan, Tokenizer, UnifiedTransformer,
                         WordText, generate_image, generate_text, load_checkpoint, load_pretrained,
                         make_optimizers, save_checkpoint, save_pretrained)
from unimod_mini.atomic_files import (disk_trouble, json_text, plain, save_data, whole_file,
                                      write_json)
from unimod_mini.data.shards import Shards, write_shards

PLAN = Plan({"t2i": (1, .5, .3), "mmu": (.4, 1, 1)})
WORDS = ["a", "b", "2*3", "USER:", "ASSISTANT:"]
numbers = st.one_of(st.integers(-9, 9), st.floats(allow_nan=False, allow_infinity=False, width=32), st.booleans())
leaves = st.one_of(numbers, st.text(max_size=4), st.none(), numbers.map(np.asarray).map(lambda x: x[()]),
                   st.text(alphabet="ab", min_size=1, max_size=4).map(np.str_))
contents = st.recursive(leaves, lambda inner: st.one_of(st.lists(inner, max_size=3), st.tuples(inner, inner),
                                                        st.dictionaries(st.text(max_size=3), inner, max_size=3)), max_leaves=8)


def small(dtype=torch.float32):
    return build(tiny("emu3"), PLAN, dtype=dtype)


def same(one, two):
    first, second = one.state_dict(), two.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# ---------------------------------------------------------------- plain data

@given(contents)
def test_plain_data_comes_back_from_both_kinds_of_file(content):
    """Whatever mix of Python's and numpy's numbers, texts, lists, tuples and dicts: it is equal,
    and loads safely.
    """
    data = plain({"content": content})
    assert data == {"content": content} and plain(data) == data
    buffer = io.BytesIO()
    torch.save(data, buffer), buffer.seek(0)
    assert torch.load(buffer, weights_only=True) == data
    assert json.loads(json_text(data)) == json.loads(json.dumps(data))


def test_what_people_have_becomes_plain():
    """Arrays, paths, dataclasses, tensors' shapes and versions, ordered and counted things."""
    got = plain({"array": np.arange(3.0), "path": Path("a/b"), "plan": PLAN, "shape": torch.zeros(2, 3).shape,
                 "version": torch.__version__, np.str_("key"): np.bool_(True)})
    assert torch.equal(got.pop("array"), torch.arange(3.0, dtype=torch.float64))
    assert got == {"path": "a/b", "plan": {"keep": PLAN.keep, "shared_router": False}, "shape": [2, 3],
                   "version": str(torch.__version__), "key": True}
    assert {type(x) for x in (got["version"], *got)} == {str} and type(got["key"]) is bool


@pytest.mark.parametrize("value, named", [(argparse.Namespace(lr=1), "extra is a Namespace"), (object(), "extra is a object"),
                                          ({"a": [1, len]}, r"extra\['a'\]\[1\] is a builtin_function_or_method"),
                                          (np.array(["a"]), "extra is a ndarray"), (torch.float32, "extra is a dtype")])
def test_what_is_not_plain_is_refused_by_name(tmp_path, value, named):
    """Before the file is touched: an older one stays, no temporary one appears."""
    save_checkpoint(tmp_path / "c.pt", small())
    before = (tmp_path / "c.pt").read_bytes()
    with pytest.raises(ValueError, match=f"data.*{named.replace('extra', '')}.*only plain data can be stored"):
        save_checkpoint(tmp_path / "c.pt", small(), extra=value)
    assert (tmp_path / "c.pt").read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["c.pt"]


def test_a_checkpoint_with_numpy_and_paths_loads(tmp_path):
    """What a script has at hand beside the weights comes back as plain data."""
    extras = {"accuracy": np.mean([0.5, 1.0]), "step": np.int64(3), "losses": np.zeros(3), "out": Path("x"), "plans": [PLAN],
              "right": np.bool_(True), "args": vars(argparse.Namespace(out=Path("x")))}
    save_checkpoint(tmp_path / "c.pt", small(), **extras)
    _, back = load_checkpoint(tmp_path / "c.pt")
    assert torch.equal(back.pop("losses"), torch.zeros(3, dtype=torch.float64))
    assert back == {"accuracy": 0.75, "step": 3, "out": "x", "plans": [{"keep": PLAN.keep, "shared_router": False}],
                    "right": True, "args": {"out": "x"}}


@pytest.mark.parametrize("change", [dict(rope_theta=np.float64(1e4)), dict(rope_theta=np.float32(1e4)), dict(gate=np.str_("tanh")),
                                    dict(rope_fraction=np.float64(1)), dict(attention_dropout=np.float64(0)),
                                    dict(qk_norm=np.bool_(False)), dict(backbone=np.str_("emu3"))])
def test_numpy_in_a_config_is_saved_as_python_has_it(tmp_path, change):
    """Both kinds of file are written and read."""
    pytest.importorskip("safetensors")
    base = dict(backbone="emu3", n_layer=1, n_head=2, n_kv_head=1, d_model=16, d_ff=16, vocab_size=30, max_length=64, image_start=30)
    model = UnifiedTransformer(ModelConfig(**base | change))
    save_checkpoint(tmp_path / "c.pt", model), save_pretrained(model, tmp_path / "hf")
    for back in (load_checkpoint(tmp_path / "c.pt")[0], load_pretrained(tmp_path / "hf")):
        assert same(back, model) and back.config == model.config
        assert {type(x) for x in vars(back.config).values()} <= {str, int, float, bool}


@pytest.mark.parametrize("words, system", [(np.unique(WORDS), "USER:"), (WORDS, np.str_("USER:"))])
def test_words_from_numpy_are_words(tmp_path, words, system):
    """A data set and a checkpoint whose tokenizer was made of numpy's strings can be read."""
    tokenizer = Tokenizer("emu3", WordText(words), Palette(np.zeros((3, 4, 4, 3), np.uint8)), (2, 3), 14, system, "ASSISTANT:")
    write_shards(tmp_path / "d", tokenizer, {"train": {"t2i": [("a b", "", torch.zeros(2, 3, dtype=torch.long))]}})
    shards = Shards(tmp_path / "d")
    assert shards.texts(shards.sample("t2i", 0)) == ("a b", "")
    save_checkpoint(tmp_path / "c.pt", small(), tokenizer=tokenizer.state())
    assert Tokenizer.from_state(load_checkpoint(tmp_path / "c.pt")[1]["tokenizer"]).text.ids == tokenizer.text.ids


def test_json_has_no_nan(tmp_path):
    """Numbers that are not finite are null, in a list and a dict too, so that every reader takes
    the file.
    """
    write_json(tmp_path / "a.json", {"a": math.nan, "b": [1.5, -math.inf], "c": {"d": math.inf, "NaN": "NaN"}})
    assert json.loads((tmp_path / "a.json").read_text(), parse_constant=lambda name: 1 / 0) == {
        "a": None, "b": [1.5, None], "c": {"d": None, "NaN": "NaN"}}


def test_about_is_refused_before_the_samples_are_read(tmp_path):
    """write_shards(about=..) of what is no JSON: hours of writing are not lost; numpy's numbers
    are JSON.
    """
    tokenizer = Tokenizer("emu3", ByteText(), Palette(np.zeros((3, 4, 4, 3), np.uint8)), (2, 3), 14)
    read = []

    def samples():
        read.append(1)
        yield "a", "", torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="is a object: only plain data"):
        write_shards(tmp_path / "d", tokenizer, {"train": {"t2i": samples()}}, about={"x": object()})
    assert not read
    write_shards(tmp_path / "d", tokenizer, {"train": {"t2i": samples()}}, about={"pictures": np.int64(3)})
    assert Shards(tmp_path / "d").about["pictures"] == 3


# ---------------------------------------------------------------- read back, then renamed

def test_what_does_not_come_back_is_not_renamed(tmp_path, monkeypatch):
    """A disk that returns other bytes than it was given: an error, the older file stays, nothing
    else is left.
    """
    save_data(tmp_path / "a.pt", {"x": torch.zeros(3)})
    real = torch.load
    for damage in (lambda data: {}, lambda data: data | {"x": torch.zeros(4)}, lambda data: 1 / 0):
        monkeypatch.setattr(torch, "load", lambda *given, **options: damage(real(*given, **options)))
        with pytest.raises((OSError, ZeroDivisionError)):
            save_data(tmp_path / "a.pt", {"x": torch.ones(3)})
    monkeypatch.undo()
    assert torch.load(tmp_path / "a.pt")["x"].tolist() == [0, 0, 0] and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("error", (KeyboardInterrupt, ValueError, MemoryError))
def test_nothing_is_left_of_a_file_that_was_not_finished(tmp_path, error):
    """Whatever ends the writing, Ctrl-C too: no temporary file, no half of a file; a new folder
    is made for a file.
    """
    with pytest.raises(error), whole_file(tmp_path / "new" / "a.txt") as file:
        file.write("half")
        raise error
    assert list((tmp_path / "new").iterdir()) == []
    with whole_file(tmp_path / "new" / "a.txt") as file:
        file.write("whole")
    assert (tmp_path / "new" / "a.txt").read_text() == "whole"


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="a limit on a file's size stands for the full disk")
@pytest.mark.parametrize("kind", ("checkpoint", "pretrained", "array", "json"))
def test_a_full_disk_is_an_error_of_the_disk(tmp_path, kind):
    """Wherever the room ends: one OSError that says so, what was there before is whole, nothing
    else is left.
    """
    if kind == "pretrained":
        pytest.importorskip("safetensors")
    first, second = build(tiny("emu3", d_ff=400), PLAN, 0, torch.float32), build(tiny("emu3", d_ff=400), PLAN, 1, torch.float32)
    path = tmp_path / "hf" / "model.safetensors" if kind == "pretrained" else tmp_path / "file"

    def save(model):
        if kind == "checkpoint":
            save_checkpoint(path, model)
        elif kind == "pretrained":
            save_pretrained(model, path.parent)
        elif kind == "json":
            write_json(path, [p.tolist() for p in model.parameters()])
        else:
            with whole_file(path, "wb") as file:
                np.save(file, np.concatenate([p.detach().numpy().ravel() for p in model.parameters()]))
    save(first)
    before, limits = {p: p.read_bytes() for p in path.parent.iterdir()}, resource.getrlimit(resource.RLIMIT_FSIZE)
    for part in (1, 7, 15, 19):
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before[path]) * part // 20, limits[1]))
        try:
            with pytest.raises(OSError, match="too large|is the disk full"):
                save(second)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {p: p.read_bytes() for p in path.parent.iterdir()} == before


def test_errors_that_have_nothing_to_do_with_the_disk_stay_what_they_are():
    """A missing file behind an error is not a full disk."""
    try:
        try:
            raise FileNotFoundError(errno.ENOENT, "gone")
        except FileNotFoundError:
            raise ValueError("wrong") from None
    except ValueError as error:
        assert disk_trouble(error) is None
    assert disk_trouble(OSError(errno.ENOSPC, "x")) == "No space left on device"


# ---------------------------------------------------------------- models in a wrapper

def wrapped(model):
    """What torch.compile and DistributedDataParallel make of a model, and both of them."""
    compiled = torch.compile(model, backend="eager")
    return compiled, torch.nn.DataParallel(model), torch.nn.DataParallel(compiled)


def test_a_wrapped_model_is_saved_as_itself(tmp_path):
    """Checkpoint and folder hold the names and weights of the model inside."""
    pytest.importorskip("safetensors")
    model = small()
    for outer in wrapped(model):
        save_checkpoint(tmp_path / "c.pt", outer), save_pretrained(outer, tmp_path / "hf")
        assert same(load_checkpoint(tmp_path / "c.pt")[0], model) and same(load_pretrained(tmp_path / "hf"), model)


@pytest.mark.parametrize("prefix", ("_orig_mod.", "module.", "module._orig_mod."))
def test_names_of_a_wrapper_are_read(tmp_path, prefix):
    """Weights that others saved from a wrapped model."""
    safetensors = pytest.importorskip("safetensors.torch")
    model = small()
    save_checkpoint(tmp_path / "c.pt", model), save_pretrained(model, tmp_path / "hf")
    stored = torch.load(tmp_path / "c.pt", weights_only=True)
    stored["model"] = {prefix + name: weight for name, weight in stored["model"].items()}
    torch.save(stored, tmp_path / "c.pt")
    for file in (tmp_path / "hf").glob("*.safetensors"):
        safetensors.save_file({prefix + name: weight for name, weight in safetensors.load_file(file).items()}, file)
    assert same(load_checkpoint(tmp_path / "c.pt")[0], model) and same(load_pretrained(tmp_path / "hf"), model)


@pytest.mark.parametrize("backbone", ("showo", "emu3"))
def test_a_compiled_model_generates_and_trains(backbone):
    """torch.compile(model) draws, answers and gets optimisers as the model does."""
    tokenizer = Tokenizer(backbone, WordText(WORDS), Palette((torch.arange(9 * 48).view(9, 4, 4, 3) % 251).byte()), (2, 3), 8,
                          "USER:", "ASSISTANT:")
    model = build(tiny(backbone, **tokenizer.sizes()), PLAN, dtype=torch.float32)
    codes = torch.zeros(2, 3, dtype=torch.long)
    calls = (lambda m: generate_text(m, tokenizer, codes, "a"), lambda m: generate_image(m, tokenizer, "a", seed=1).tolist(),
             lambda m: [len(group["params"]) for optimizer in make_optimizers(m) for group in optimizer.param_groups])
    for act in calls:
        expected = act(model)
        assert [act(outer) for outer in wrapped(model)] == [expected] * 3


def test_tied_weights_are_written_twice(tmp_path):
    """A head that shares the embedding's memory: both names are in the folder, nothing else is
    left there.
    """
    pytest.importorskip("safetensors")
    model = small()
    model.head.weight = model.embed.weight
    save_pretrained(model, tmp_path / "hf")
    back = load_pretrained(tmp_path / "hf")
    assert torch.equal(back.head.weight, model.embed.weight) and torch.equal(back.embed.weight, model.embed.weight)
    assert {p.suffix for p in (tmp_path / "hf").iterdir()} == {".json", ".safetensors"}

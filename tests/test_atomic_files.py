"""atomic_files.py: what is written can be read, or is refused before a byte is written.

And what is stored with it: checkpoints, folders, data sets; wrapped models; a full disk."""
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
from unimod_mini.atomic_files import (as_plain_data, disk_trouble, json_text, save_data, whole_file,
                                      write_json)
from unimod_mini.data.shards import Shards, write_shards

PLAN = Plan({"t2i": (1, .5, .3), "mmu": (.4, 1, 1)})
WORDS = ["a", "b", "2*3", "USER:", "ASSISTANT:"]
numbers = st.one_of(st.integers(-9, 9), st.booleans(),
                    st.floats(allow_nan=False, allow_infinity=False, width=32))
leaves = st.one_of(numbers, st.text(max_size=4), st.none(),
                   numbers.map(np.asarray).map(lambda x: x[()]),
                   st.text(alphabet="ab", min_size=1, max_size=4).map(np.str_))


def nested(inner):
    return st.one_of(st.lists(inner, max_size=3), st.tuples(inner, inner),
                     st.dictionaries(st.text(max_size=3), inner, max_size=3))


contents = st.recursive(leaves, nested, max_leaves=8)


def small(dtype=torch.float32):
    return build(tiny("emu3"), PLAN, dtype=dtype)


def same(one, two):
    first, second = one.state_dict(), two.state_dict()
    if first.keys() != second.keys():
        return False
    return all(torch.equal(first[name], second[name]) for name in first)


def tokenizer_of(words=WORDS, system="USER:", text=None):
    palette = Palette(np.zeros((3, 4, 4, 3), np.uint8))
    text = text or WordText(words)
    return Tokenizer("emu3", text, palette, (2, 3), 14, system, "ASSISTANT:")


# --- Plain data ---

@given(contents)
def test_plain_data_comes_back_from_both_kinds_of_file(content):
    """Any mix of Python's and numpy's numbers, texts, lists, tuples and dicts comes back equal."""
    data = as_plain_data({"content": content})
    assert data == {"content": content} and as_plain_data(data) == data
    buffer = io.BytesIO()
    torch.save(data, buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True) == data
    assert json.loads(json_text(data)) == json.loads(json.dumps(data))


def test_a_checkpoint_with_what_a_script_has_at_hand(tmp_path):
    """Arrays, paths, dataclasses, shapes and versions come back as plain data."""
    extras = {"accuracy": np.mean([0.5, 1.0]), "step": np.int64(3), "losses": np.arange(3.0),
              "out": Path("a/b"), "plans": [PLAN], "right": np.bool_(True),
              "shape": torch.zeros(2, 3).shape, "version": torch.__version__,
              "args": vars(argparse.Namespace(out=Path("x"))), "names": {np.str_("key"): 1}}
    save_checkpoint(tmp_path / "c.pt", small(), **extras)
    _, back = load_checkpoint(tmp_path / "c.pt")
    assert torch.equal(back.pop("losses"), torch.arange(3.0, dtype=torch.float64))
    assert back == {"accuracy": 0.75, "step": 3, "out": "a/b", "right": True, "shape": [2, 3],
                    "plans": [{"keep": PLAN.keep, "shared_router": False}],
                    "version": str(torch.__version__), "args": {"out": "x"}, "names": {"key": 1}}
    assert type(back["version"]) is str and type(back["right"]) is bool
    assert {type(key) for key in back["names"]} == {str}


@pytest.mark.parametrize("value, named", [
    (argparse.Namespace(lr=1), "is a Namespace"), (object(), "is a object"),
    ({"a": [1, len]}, r"\['a'\]\[1\] is a builtin_function_or_method"),
    (np.array(["a"]), "is a ndarray"), (torch.float32, "is a dtype")])
def test_what_is_not_plain_is_refused_by_name(tmp_path, value, named):
    """Before the file is touched: an older one stays, no temporary one appears."""
    save_checkpoint(tmp_path / "c.pt", small())
    before = (tmp_path / "c.pt").read_bytes()
    with pytest.raises(ValueError, match=fr"data\['extra'\].*{named}: only plain data can be"):
        save_checkpoint(tmp_path / "c.pt", small(), extra=value)
    assert (tmp_path / "c.pt").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]


@pytest.mark.parametrize("change", [
    dict(rope_theta=np.float64(1e4)), dict(rope_theta=np.float32(1e4)), dict(gate=np.str_("tanh")),
    dict(rope_fraction=np.float64(1)), dict(attention_dropout=np.float64(0)),
    dict(qk_norm=np.bool_(False)), dict(backbone=np.str_("emu3"))])
def test_numpy_in_a_config_is_saved_as_python_has_it(tmp_path, change):
    """Both kinds of file are written and read."""
    pytest.importorskip("safetensors")
    base = dict(backbone="emu3", n_layer=1, n_head=2, n_kv_head=1, d_model=16, d_ff=16,
                vocab_size=30, max_length=64, image_start=30)
    model = UnifiedTransformer(ModelConfig(**base | change))
    save_checkpoint(tmp_path / "c.pt", model)
    save_pretrained(model, tmp_path / "hf")
    for back in (load_checkpoint(tmp_path / "c.pt")[0], load_pretrained(tmp_path / "hf")):
        assert same(back, model) and back.config == model.config
        assert {type(x) for x in vars(back.config).values()} <= {str, int, float, bool}


@pytest.mark.parametrize("words, system", [(np.unique(WORDS), "USER:"), (WORDS, np.str_("USER:"))])
def test_words_from_numpy_are_words(tmp_path, words, system):
    """A data set and a checkpoint whose tokenizer was made of numpy's strings can be read."""
    tokenizer = tokenizer_of(words, system)
    samples = [("a b", "", torch.zeros(2, 3, dtype=torch.long))]
    write_shards(tmp_path / "d", tokenizer, {"train": {"t2i": samples}})
    shards = Shards(tmp_path / "d")
    assert shards.texts(shards.sample("t2i", 0)) == ("a b", "")
    save_checkpoint(tmp_path / "c.pt", small(), tokenizer=tokenizer.state())
    stored = load_checkpoint(tmp_path / "c.pt")[1]["tokenizer"]
    assert Tokenizer.from_state(stored).text.ids == tokenizer.text.ids


def test_json_has_no_nan(tmp_path):
    """Numbers that are not finite are null, in a list and a dict too, for every reader."""
    write_json(tmp_path / "a.json", {"a": math.nan, "b": [1.5, -math.inf],
                                     "c": {"d": math.inf, "NaN": "NaN"}})
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text, parse_constant=lambda name: 1 / 0) == {
        "a": None, "b": [1.5, None], "c": {"d": None, "NaN": "NaN"}}


def test_about_is_refused_before_the_samples_are_read(tmp_path):
    """write_shards(about=..) of what is no JSON: hours of writing are not lost."""
    tokenizer, read = tokenizer_of(text=ByteText()), []

    def samples():
        read.append(1)
        yield "a", "", torch.zeros(2, 3, dtype=torch.long)

    def write(about):
        write_shards(tmp_path / "d", tokenizer, {"train": {"t2i": samples()}}, about=about)

    with pytest.raises(ValueError, match="is a object: only plain data"):
        write({"x": object()})
    assert not read
    write({"pictures": np.int64(3)})
    assert Shards(tmp_path / "d").about["pictures"] == 3


# --- Read back, then renamed ---

def test_what_does_not_come_back_is_not_renamed(tmp_path, monkeypatch):
    """A disk that returns other bytes than it was given: an error, and the older file stays."""
    save_data(tmp_path / "a.pt", {"x": torch.zeros(3)})
    real = torch.load
    for damage in (lambda data: {}, lambda data: data | {"x": torch.zeros(4)}, lambda data: 1 / 0):
        monkeypatch.setattr(torch, "load", lambda *a, **options: damage(real(*a, **options)))
        with pytest.raises((OSError, ZeroDivisionError)):
            save_data(tmp_path / "a.pt", {"x": torch.ones(3)})
    monkeypatch.undo()
    assert torch.load(tmp_path / "a.pt")["x"].tolist() == [0, 0, 0]
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("error", (KeyboardInterrupt, ValueError, MemoryError))
def test_nothing_is_left_of_a_file_that_was_not_finished(tmp_path, error):
    """Whatever ends the writing, Ctrl-C too: no temporary file, no half of a file."""
    with pytest.raises(error), whole_file(tmp_path / "new" / "a.txt") as file:
        file.write("half")
        raise error
    assert list((tmp_path / "new").iterdir()) == []
    with whole_file(tmp_path / "new" / "a.txt") as file:
        file.write("whole")
    assert (tmp_path / "new" / "a.txt").read_text() == "whole"


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="a full disk is played by a size limit")
@pytest.mark.parametrize("kind", ("checkpoint", "pretrained", "array", "json"))
def test_a_full_disk_is_an_error_of_the_disk(tmp_path, kind):
    """Wherever the room ends: one OSError that says so, what was there before is whole, nothing
    else is left."""
    first, second = (build(tiny("emu3", d_ff=400), PLAN, seed, torch.float32) for seed in (0, 1))
    path = tmp_path / "file"
    if kind == "pretrained":
        pytest.importorskip("safetensors")
        path = tmp_path / "hf" / "model.safetensors"

    def save(model):
        if kind == "checkpoint":
            save_checkpoint(path, model)
        elif kind == "pretrained":
            save_pretrained(model, path.parent)
        elif kind == "json":
            write_json(path, [p.tolist() for p in model.parameters()])
        else:
            weights = [p.detach().numpy().ravel() for p in model.parameters()]
            with whole_file(path, "wb") as file:
                np.save(file, np.concatenate(weights))

    save(first)
    before = {p: p.read_bytes() for p in path.parent.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
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


# --- Models in a wrapper ---

def wrapped(model):
    """What torch.compile and DistributedDataParallel make of a model, and both of them."""
    compiled = torch.compile(model, backend="eager")
    return compiled, torch.nn.DataParallel(model), torch.nn.DataParallel(compiled)


def assert_both_files_hold(folder, model):
    assert same(load_checkpoint(folder / "c.pt")[0], model)
    assert same(load_pretrained(folder / "hf"), model)


def test_a_wrapped_model_is_saved_as_itself(tmp_path):
    """Checkpoint and folder hold the names and weights of the model inside."""
    pytest.importorskip("safetensors")
    model = small()
    for outer in wrapped(model):
        save_checkpoint(tmp_path / "c.pt", outer)
        save_pretrained(outer, tmp_path / "hf")
        assert_both_files_hold(tmp_path, model)


@pytest.mark.parametrize("prefix", ("_orig_mod.", "module.", "module._orig_mod."))
def test_names_of_a_wrapper_are_read(tmp_path, prefix):
    """Weights that others saved from a wrapped model."""
    safetensors = pytest.importorskip("safetensors.torch")
    model = small()
    save_checkpoint(tmp_path / "c.pt", model)
    save_pretrained(model, tmp_path / "hf")
    stored = torch.load(tmp_path / "c.pt", weights_only=True)
    stored["model"] = {prefix + name: weight for name, weight in stored["model"].items()}
    torch.save(stored, tmp_path / "c.pt")
    for file in (tmp_path / "hf").glob("*.safetensors"):
        weights = safetensors.load_file(file)
        safetensors.save_file({prefix + name: weights[name] for name in weights}, file)
    assert_both_files_hold(tmp_path, model)


@pytest.mark.parametrize("backbone", ("showo", "emu3"))
def test_a_compiled_model_generates_and_trains(backbone):
    """torch.compile(model) draws, answers and gets optimizers as the model does."""
    palette = Palette((torch.arange(9 * 48).view(9, 4, 4, 3) % 251).byte())
    tokenizer = Tokenizer(backbone, WordText(WORDS), palette, (2, 3), 8, "USER:", "ASSISTANT:")
    model = build(tiny(backbone, **tokenizer.sizes()), PLAN, dtype=torch.float32)

    def acts(outer):
        answer = generate_text(outer, tokenizer, torch.zeros(2, 3, dtype=torch.long), "a")
        image = generate_image(outer, tokenizer, "a", seed=1)
        groups = [len(group["params"]) for optimizer in make_optimizers(outer)
                  for group in optimizer.param_groups]
        return answer, image.tolist(), groups

    assert [acts(outer) for outer in wrapped(model)] == [acts(model)] * 3


def test_tied_weights_are_written_twice(tmp_path):
    """A head that shares the embedding's memory: the folder has both, and nothing else."""
    pytest.importorskip("safetensors")
    model = small()
    model.head.weight = model.embed.weight
    save_pretrained(model, tmp_path / "hf")
    back = load_pretrained(tmp_path / "hf")
    for weight in (back.head.weight, back.embed.weight):
        assert torch.equal(weight, model.embed.weight)
    assert {p.suffix for p in (tmp_path / "hf").iterdir()} == {".json", ".safetensors"}

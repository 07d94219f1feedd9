"""unimod_mini.data.shards: the format on disk, and a loader whose samples depend on the seed and
the step alone.
"""
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unimod_mini import VQ, ByteText, Palette, Tokenizer, WordText
from unimod_mini.image_codecs import Codes
from unimod_mini.data.shards import (HEADER, Loader, Sample, Shards, layout, tokenizer_hash,
                                     write_shards)

WORDS = "a b c d 2*3 USER: ASSISTANT:".split()
seeds = st.integers(0, 2**32)


def make_tokenizer(backbone="showo", text=None, image=None, grid=(2, 3), budget=8, **prompts):
    image = image or Palette(torch.arange(7 * 12).view(7, 2, 2, 3))
    prompts = {"system": "USER:", "assistant": "ASSISTANT:", **prompts}
    return Tokenizer(backbone, text or WordText(WORDS), image, grid, budget, **prompts)


def make_samples(n, task, seed=0):
    """n samples; the question of number i spells i in base 3, so that no two are the same (n <=
    81).
    """
    generator = torch.Generator().manual_seed(seed)
    digits = lambda i: " ".join("abc"[i // 3**k % 3] for k in range(4))
    return [Sample(digits(i), "d c"[:i % 2 * 2 + 1] if task == "mmu" else "",
                   None if task == "lm" else torch.randint(7, (2, 3), generator=generator)) for i in range(n)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A data set of each backbone: 30 of t2i and 20 of mmu in shards of 7, 5 of lm; 4 and 3 held
    out.
    """
    made = {}
    for backbone in ("showo", "emu3"):
        made[backbone] = tmp_path_factory.mktemp(backbone) / "data"
        samples = {"train": {"t2i": make_samples(30, "t2i"), "mmu": make_samples(20, "mmu", 1),
                             "lm": make_samples(5, "lm")},
                   "held": {"t2i": make_samples(4, "t2i", 2), "mmu": make_samples(3, "mmu", 3)}}
        write_shards(made[backbone], make_tokenizer(backbone), samples, per_shard=7, about={"source": "a test"})
    return made


def is_sample(shards, read, written):
    """Is what was read, ids, what was written, texts?"""
    same = read.codes is written.codes is None or torch.equal(read.codes, written.codes)
    return same and shards.texts(read) == (written.question, written.answer)


def same_batch(one, two):
    return all(a is b is None or torch.equal(a, b) for a, b in zip(one, two, strict=True))


# ---------------------------------------------------------------- the format

@pytest.mark.parametrize("backbone", ("showo", "emu3"))
def test_what_is_written_is_read(folders, backbone):
    """Every sample of every split and task comes back, in order, across the borders of files;
    counts agree.
    """
    shards = Shards(folders[backbone])
    for split, task, n, seed in (("train", "t2i", 30, 0), ("train", "mmu", 20, 1), ("train", "lm", 5, 0),
                                 ("held", "t2i", 4, 2), ("held", "mmu", 3, 3)):
        assert shards.count(task, split) == n
        for i, sample in enumerate(make_samples(n, task, seed)):
            assert is_sample(shards, shards.sample(task, i, split), sample)
    assert shards.count("lm", "held") == 0 and shards.about["source"] == "a test"
    assert shards.tokenizer_hash == tokenizer_hash(make_tokenizer(backbone))
    names = {path.name for path in folders[backbone].iterdir()}
    assert {f"train-t2i-0000{i}.shard" for i in range(5)} | {"held-mmu-00000.shard", "dataset.json"} < names
    assert not any(name.endswith(".tmp") for name in names)
    for index in (-1, 30):
        with pytest.raises(IndexError, match=f"sample {index} of train-t2i, there are 30"):
            shards.sample("t2i", index)


@pytest.mark.parametrize("vocabulary, dtype", [(20, "<u2"), (70_000, "<u4")])
def test_numpy_alone_reads_a_shard(tmp_path, vocabulary, dtype):
    """The recipe of the module's docstring: json for the header, memmap for the rest; uint32
    when ids need it.
    """
    words = WORDS + [f"w{i}" for i in range(vocabulary - len(WORDS))]
    tokenizer, samples = make_tokenizer(text=WordText(words)), make_samples(5, "mmu")
    if vocabulary > 2**16:
        samples[3] = samples[3]._replace(question=words[-1])
    write_shards(tmp_path / "d", tokenizer, {"train": {"mmu": samples}})
    path = tmp_path / "d" / "train-mmu-00000.shard"
    header = json.loads(open(path, "rb").read(4096))
    array = np.memmap(path, header["dtype"], "r", 4096, tuple(header["shape"]))
    assert header["dtype"] == dtype and array.shape == (5, 2 + 6 + 6) and header["grid"] == [2, 3]
    for i, sample in enumerate(samples):
        n_question, n_answer = array[i, :2]
        text = array[i, 2:2 + header["text_length"]]
        codes = array[i, 2 + header["text_length"]:]
        asked = [words[j] for j in text[:n_question]]
        assert " ".join(asked) == sample.question and codes.reshape(2, 3).tolist() == sample.codes.tolist()
        assert " ".join(words[j] for j in text[n_question:n_question + n_answer]) == sample.answer
        assert not text[n_question + n_answer:].any()


@given(text=st.text(max_size=10), answer=st.text(max_size=10))
@settings(max_examples=20)
def test_any_text_in_bytes(tmp_path_factory, text, answer):
    """Unicode questions and answers come back as they were."""
    text, answer = (x.encode("utf-8", "ignore").decode() for x in (text, answer))
    folder = tmp_path_factory.mktemp("bytes") / "d"
    sample = Sample(text, answer, torch.zeros(2, 3, dtype=torch.long))
    write_shards(folder, make_tokenizer(text=ByteText(), budget=90), {"held": {"mmu": [sample]}})
    shards = Shards(folder)
    assert is_sample(shards, shards.sample("mmu", 0, "held"), sample)


@pytest.mark.parametrize("samples, message", [
    ({"train": {"t2i": [("a " * 9, "", torch.zeros(2, 3).long())]}}, "text of 9 tokens is over the budget of 6"),
    ({"train": {"mmu": [("a b c", "a b c d", torch.zeros(2, 3).long())]}}, "text of 7 tokens is over the budget of 6"),
    ({"train": {"t2i": [("a", "", torch.zeros(3, 3).long())]}}, r"codes of \(3, 3\), .* grid is \(2, 3\)"),
    ({"train": {"t2i": [("a", "", torch.full((2, 3), 7))]}}, r"image codes lie in \[7, 7\], expected \[0, 7\)"),
    ({"train": {"t2i": [("a", "b", torch.zeros(2, 3).long())]}}, "a sample of t2i has a picture and no answer: 'a'"),
    ({"train": {"mmu": [("a", "b", None)]}}, "a sample of mmu has a picture and an answer"),
    ({"train": {"lm": [("a", "", torch.zeros(2, 3).long())]}}, "a sample of lm has no picture and no answer"),
    ({"test": {"t2i": []}}, r"splits are train, held, tasks t2i, mmu, lm, not 'test'"),
    ({"train": {"vqa": []}}, r"tasks t2i, mmu, lm, not 'train': \['vqa'\]")])
def test_what_cannot_be_written(tmp_path, samples, message):
    """A sample that does not fit ends the writing with one line, and leaves no data set."""
    with pytest.raises(ValueError, match=message):
        write_shards(tmp_path, make_tokenizer(), samples)
    with pytest.raises(FileNotFoundError, match="dataset.json is missing: python -m unimod_mini.prepare"):
        Shards(tmp_path)


def test_an_interrupted_writing_is_begun_anew(tmp_path):
    """What a call that was cut short left is not mixed with what the next one writes; a finished
    data set is kept.
    """
    def dies():
        yield from make_samples(20, "t2i")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path, make_tokenizer(), {"train": {"t2i": dies()}}, per_shard=3)
    (tmp_path / "mine.shard").write_text("of somebody else")
    assert len(list(tmp_path.glob("train-t2i-*.shard"))) == 6
    assert write_shards(tmp_path, make_tokenizer(), {"train": {"t2i": make_samples(4, "t2i")}}) == {"train": {"t2i": 4}}
    assert {path.name for path in tmp_path.iterdir()} == {"mine.shard", "train-t2i-00000.shard", "tokenizer.pt",
                                                          "dataset.json"}
    with pytest.raises(FileExistsError, match="holds a finished data set"):
        write_shards(tmp_path, make_tokenizer(), {"train": {"t2i": []}})


# ---------------------------------------------------------------- what is refused

def header_of(path, **changes):
    """Rewrite the header of a shard."""
    data = path.read_bytes()
    path.write_bytes(json.dumps({**json.loads(data[:HEADER]), **changes}).encode().ljust(HEADER) + data[HEADER:])


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_a_text_longer_than_two_bytes_can_count():
    """The length of a text is one of the numbers of a record: a budget above 65,535 needs four
    bytes, as an id would.
    """
    for budget, dtype in ((2**16 - 4, "<u2"), (70_000, "<u4")):
        tokenizer = Tokenizer("showo", ByteText(), Codes(16), (2, 2), budget)
        assert layout(tokenizer, "t2i", 1)["dtype"] == dtype


@pytest.mark.parametrize("damage, message", [
    (lambda p: p.write_bytes(p.read_bytes()[:-1]), "bytes, its header says .* cut short or added to, copy"),
    (lambda p: p.write_bytes(p.read_bytes()[:HEADER]), "bytes, its header says"),
    (lambda p: p.write_bytes(p.read_bytes()[:99]), "is not a shard of unimod_mini"),
    (lambda p: p.write_bytes(b""), "is not a shard of unimod_mini"),
    (lambda p: p.write_bytes(p.read_bytes() + b"\0\0"), "bytes, its header says"),
    (lambda p: flip(p, HEADER), "was altered: its bytes do not have the hash"),
    (lambda p: flip(p, -1), "was altered: its bytes do not have the hash"),
    (lambda p: flip(p, 0), "is not a shard of unimod_mini"),
    (lambda p: header_of(p, version=1), "has version 1 of the format, this program reads 2"),
    (lambda p: header_of(p, format="other"), "is not a shard of unimod_mini"),
    (lambda p: header_of(p, tokenizer="0" * 64), "was written with another tokenizer"),
    (lambda p: header_of(p, shape=[8, 14]), "bytes, its header says"),
    (lambda p: header_of(p, file="train-t2i-00002.shard"), "was written as train-t2i-00002.shard")])
def test_damaged_shards_are_refused_by_name(folders, tmp_path, damage, message):
    """Truncated, lengthened, altered, of another version, tokenizer, split or layout: a
    ValueError naming the file.
    """
    shutil.copytree(folders["showo"], tmp_path / "d")
    path = tmp_path / "d" / "train-t2i-00001.shard"
    damage(path)
    with pytest.raises(ValueError, match=message) as error:
        Shards(tmp_path / "d")
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_shards_that_are_missing_strange_or_renamed(folders, tmp_path):
    """A lost shard is found by its count, a renamed one by its header, a tokenizer that is none
    by its name.
    """
    def copy(name):
        return Path(shutil.copytree(folders["emu3"], tmp_path / name))
    lost = copy("lost")
    (lost / "train-mmu-00002.shard").unlink()
    with pytest.raises(ValueError, match="dataset.json counts 20 samples of train-mmu, .* hold 14: a shard is missing"):
        Shards(lost)
    renamed = copy("renamed")
    (renamed / "train-mmu-00002.shard").rename(renamed / "train-mmu-00009.shard")
    with pytest.raises(ValueError, match="train-mmu-00009.shard was written as train-mmu-00002.shard"):
        Shards(renamed)
    for name, text, message in (("tokenizer.pt", "{}", "tokenizer.pt is not the tokenizer of a data set"),
                                ("dataset.json", "[]", "dataset.json is not the description of a data set")):
        folder = copy(name)
        (folder / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            Shards(folder)
    with pytest.raises(FileNotFoundError, match="dataset.json is missing: python -m unimod_mini.prepare"):
        Shards(tmp_path / "nowhere")
    mixed = copy("mixed")
    shutil.copy(folders["showo"] / "tokenizer.pt", mixed)
    with pytest.raises(ValueError, match=r"\.shard was written with another tokenizer than tokenizer.pt beside it"):
        Shards(mixed)


def test_unchecked_bytes_are_the_callers_choice(folders, tmp_path):
    """checksums=False reads headers alone: altered bytes pass, a wrong size does not."""
    folder = Path(shutil.copytree(folders["showo"], tmp_path / "d"))
    flip(folder / "train-t2i-00001.shard", -1)
    assert Shards(folder, checksums=False).count("t2i") == 30
    (folder / "train-t2i-00001.shard").write_bytes((folder / "train-t2i-00001.shard").read_bytes()[:-2])
    with pytest.raises(ValueError, match="train-t2i-00001.shard has"):
        Shards(folder, checksums=False)


# ---------------------------------------------------------------- the tokenizer's hash

def vq(seed=0, **sizes):
    torch.manual_seed(seed)
    return VQ(**{"n_codes": 8, "patch": 2, "width": 4, **sizes})


def test_the_hash_is_canonical(tmp_path):
    """The same tokenizer has the same hash, made twice, stored and loaded, and in another process;
    the order of the state's keys and the strides of its tensors do not count.
    """
    for image in (None, vq(), vq(quantizer="lfq")):
        one = make_tokenizer(image=image)
        torch.save(one.state(), tmp_path / "t.pt")
        state = torch.load(tmp_path / "t.pt", weights_only=True)
        assert tokenizer_hash(Tokenizer.from_state(state)) == tokenizer_hash(one)
        assert tokenizer_hash(Tokenizer.from_state(dict(reversed(state.items())))) == tokenizer_hash(one)
    code = ("import sys, torch; from unimod_mini.data.shards import read_tokenizer, tokenizer_hash; "
            "print(tokenizer_hash(read_tokenizer(sys.argv[1])))")
    out = subprocess.run([sys.executable, "-c", code, tmp_path / "t.pt"], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == tokenizer_hash(one)
    patches = torch.arange(7 * 12).view(7, 2, 2, 3)
    strided = Palette(patches.transpose(0, 3).contiguous().transpose(0, 3))
    assert not strided.patches.is_contiguous()
    assert tokenizer_hash(make_tokenizer(image=strided)) == tokenizer_hash(make_tokenizer())


def test_every_change_changes_the_hash():
    """Words, their order, patches, one VQ weight, quantizer, grid, budget, prompts, backbone:
    each changes the hash.
    """
    patches = torch.arange(7 * 12).view(7, 2, 2, 3)
    changed = patches.clone()
    changed[6, 1, 1, 2] += 1
    nudged = vq()
    with torch.no_grad():
        nudged.decoder[0].bias[0] += 1e-6
    tokenizers = [make_tokenizer(), make_tokenizer("emu3"), make_tokenizer(text=WordText(WORDS[::-1])),
                  make_tokenizer(text=WordText(WORDS + ["e"])), make_tokenizer(text=ByteText()),
                  make_tokenizer(image=Palette(changed)), make_tokenizer(image=Palette(patches[:6])),
                  make_tokenizer(image=vq()), make_tokenizer(image=vq(1)), make_tokenizer(image=nudged),
                  make_tokenizer(image=vq(quantizer="lfq")), make_tokenizer(grid=(3, 2)), make_tokenizer(budget=9),
                  make_tokenizer(system="a"), make_tokenizer(assistant="b")]
    assert len({tokenizer_hash(t) for t in tokenizers}) == len(tokenizers)


# ---------------------------------------------------------------- the permutation

@given(size=st.integers(1, 300), epoch=st.integers(0, 10**6), seed=st.integers())
def test_every_epoch_is_a_permutation(size, epoch, seed):
    """Numbers e size ..

    (e + 1) size - 1 go to every index once, in whatever order they are asked.
    """
    loader = Loader.__new__(Loader)
    loader.seed, loader.split, loader.orders = seed, "train", {}
    loader.shards = SimpleNamespace(count=lambda task, split: size)
    numbers = range(epoch * size, (epoch + 1) * size)
    index = [loader.index("t2i", number) for number in numbers]
    assert sorted(index) == list(range(size))
    loader.index("t2i", numbers.stop), loader.index("mmu", epoch)
    assert [loader.index("t2i", number) for number in reversed(numbers)] == index[::-1]


def test_epochs_seeds_and_tasks_have_orders_of_their_own(folders):
    """Two orders of 30 samples agree in few places."""
    shards = Shards(folders["emu3"])
    orders = []
    for seed, task, epoch in ((0, "t2i", 0), (0, "t2i", 1), (1, "t2i", 0), (-1, "t2i", 0)):
        loader = Loader(shards, {"t2i": 6, "mmu": 6}, seed)
        orders.append([loader.index(task, 30 * epoch + i) for i in range(30)])
    for number, one in enumerate(orders):
        for two in orders[:number]:
            assert sum(a == b for a, b in zip(one, two)) < 10


# ---------------------------------------------------------------- the loader

def questions(shards, batches):
    """The text of every row of some batches."""
    text = shards.tokenizer.text
    return [text.decode([i for i in row if i < text.size]) for batch in batches for row in batch.ids.tolist()]


def whole(folder, seed, steps, world=1, accumulate=1, per_step=(12, 12), drop=.3):
    """{task: rows of the global batches of all ranks, in the order of their numbers}, each row a
    tuple of bytes.
    """
    rows = {"t2i": [], "mmu": []}
    shards = Shards(folder, checksums=False)
    loaders = [Loader(shards, dict(zip(rows, per_step)), seed, rank, world, accumulate, drop) for rank in range(world)]
    for step in steps:
        by_rank = [loader.batches(step) for loader in loaders]
        for part in range(accumulate):
            for batches in by_rank:
                for task, batch in batches[part].items():
                    rows[task] += [tuple(None if x is None else x[i].numpy().tobytes() for x in batch)
                                   for i in range(len(batch.ids))]
    return rows


@pytest.mark.parametrize("backbone", ("showo", "emu3"))
@given(seed=seeds, first=st.integers(0, 50), world=st.sampled_from([1, 2, 3, 6]), accumulate=st.sampled_from([1, 2]))
@settings(max_examples=8)
def test_ranks_and_accumulation_change_no_sample(folders, backbone, seed, first, world, accumulate):
    """The ranks partition the global batch: all ranks' parts together are the batch of one process,
    bit for bit, with its masks and dropped captions.
    """
    steps = range(first, first + 2)
    assert whole(folders[backbone], seed, steps, world, accumulate) == whole(folders[backbone], seed, steps)


@given(seed=seeds, stop=st.integers(1, 9), world=st.sampled_from([1, 2, 3]), again=st.sampled_from([1, 2, 6]))
@settings(max_examples=8)
def test_a_restart_with_another_number_of_ranks_loses_and_repeats_nothing(folders, seed, stop, world, again):
    """Ten steps, stopped after `stop` and gone on with another number of ranks: the same stream of
    samples; and within every epoch of that stream each sample comes once.
    """
    folder = folders["emu3"]
    before, after = (whole(folder, seed, steps, ranks, drop=0) for steps, ranks in
                     ((range(stop), world), (range(stop, 10), again)))
    together = {task: before[task] + after[task] for task in before}
    assert together == whole(folder, seed, range(10), drop=0)
    for task, size in (("t2i", 30), ("mmu", 20)):
        rows = together[task]
        for epoch in range(len(rows) // size):
            assert len(set(rows[epoch * size:(epoch + 1) * size])) == size


def test_equal_counts_and_labels(folders):
    """Every rank and part has the same number of samples of every task, laid out by the
    tokenizer's own functions.
    """
    shards = Shards(folders["emu3"])
    for rank in range(3):
        for part in Loader(shards, {"t2i": 12, "mmu": 6, "lm": 6}, 5, rank, 3, 2, drop=0).batches(7):
            assert {task: len(batch.ids) for task, batch in part.items()} == {"t2i": 2, "mmu": 1, "lm": 1}
    loader, tokenizer = Loader(shards, {"t2i": 8, "mmu": 8, "lm": 8}, 3, drop=0), shards.tokenizer
    batches = loader.batches(2)[0]
    for task in batches:
        picked = [shards.sample(task, loader.index(task, number)) for number in range(16, 24)]
        asked, answers = map(list, zip(*map(shards.texts, picked)))          # encoded anew
        if task == "lm":
            twin = tokenizer.lm(asked)
        else:
            codes = torch.stack([sample.codes for sample in picked])
            twin = tokenizer.t2i(asked, codes) if task == "t2i" else tokenizer.mmu(asked, answers, codes)
        assert same_batch(batches[task], twin)


def test_masks_and_dropped_captions(folders):
    """showo: some codes are hidden and are the labels left, others in another epoch; drop empties
    about its share of the captions, 0 none and 1 all, and leaves the masks as they are.
    """
    shards = Shards(folders["showo"])
    tokenizer = shards.tokenizer
    by_drop = {drop: [Loader(shards, {"t2i": 30}, 1, drop=drop).batches(step)[0]["t2i"] for step in range(20)]
               for drop in (0, .3, 1)}
    for one, two in zip(by_drop[0], by_drop[1]):
        assert torch.equal(one.labels, two.labels) and torch.equal(one.labels != -100, one.ids == tokenizer.mask_id)
        assert (one.ids == tokenizer.mask_id).any(1).all()
    empty = {drop: sum(text == "" for text in questions(shards, batches)) for drop, batches in by_drop.items()}
    # 5 standard deviations
    assert empty[0] == 0 and empty[1] == 600 and empty[.3] == pytest.approx(180, abs=56)
    patterns = Counter(tuple((row != -100).tolist()) for batch in by_drop[0] for row in batch.labels)
    assert len(patterns) > 40
    held = Loader(shards, {"t2i": 4}, split="held", drop=0).batches(0)[0]["t2i"]
    assert sorted(questions(shards, [held])) == sorted(s.question for s in make_samples(4, "t2i"))


@pytest.mark.parametrize("start, steps", [(0, 5), (3, 7), (4, 4), (0, 1)])
def test_reading_ahead_changes_nothing(folders, monkeypatch, start, steps):
    """(step, batches(step)) in order, from any start, the next one asked for while one is used;
    stopping early ends the thread.
    """
    loader, asked = Loader(Shards(folders["showo"]), {"t2i": 4, "mmu": 2}, accumulate=2), [Event() for _ in range(9)]
    good, seen = loader.batches, []
    with monkeypatch.context() as patch:
        patch.setattr(loader, "batches", lambda step: asked[step].set() or good(step))
        for step, batches in loader.read_ahead(start, steps):
            assert step == steps - 1 or asked[step + 1].wait(10)
            seen.append((step, batches))
    assert [step for step, _ in seen] == list(range(start, steps))
    for step, batches in seen:
        for one, two in zip(batches, loader.batches(step), strict=True):
            assert one.keys() == two.keys() and all(same_batch(one[task], two[task]) for task in one)
    for step, _ in (ahead := loader.read_ahead(0, 10**9)):
        if step == 2:
            break
    ahead.close()


def test_an_error_while_reading_ahead_reaches_the_caller(folders, monkeypatch):
    """What goes wrong in the thread, ahead of its turn, is raised where the batch is taken, not
    swallowed.
    """
    loader, asked = Loader(Shards(folders["showo"]), {"t2i": 4}), [Event() for _ in range(9)]
    good = loader.batches
    monkeypatch.setattr(loader, "batches", lambda step: asked[step].set() or (good(step) if step < 3 else 1 / 0))
    seen = []
    with pytest.raises(ZeroDivisionError):
        for step, _ in loader.read_ahead(0, 9):
            assert asked[step + 1].wait(10)
            seen.append(step)
    assert seen == [0, 1, 2]


@pytest.mark.parametrize("arguments, message", [
    (dict(counts={"t2i": 10}, world=4, accumulate=2), "10 samples of t2i in a step do not divide among 4 ranks x 2 "
     "accumulation steps: 8 or 16 would do"),
    (dict(counts={"mmu": 3}, world=4), "3 samples of mmu in a step do not divide among 4 ranks x 1 .*: 4 or 8 would"),
    (dict(counts={"t2i": -4}), "-4 samples of t2i"),
    (dict(counts={"t2i": 4, "lm": 4}, split="held"), "has no sample of lm in its split held; it has .*4 of held-t2i"),
    (dict(counts={"vqa": 4}), "has no sample of vqa in its split train"),
    (dict(counts={"t2i": 0}), "a step without samples"),
    (dict(counts={}), "a step without samples"),
    (dict(counts={"t2i": 4}, rank=2, world=2), "rank 2 of 2"),
    (dict(counts={"t2i": 4}, accumulate=0), "accumulate 0"),
    (dict(counts={"t2i": 4}, drop=1.5), "drop 1.5")])
def test_loaders_that_cannot_be(folders, arguments, message):
    """Counts that do not divide name the numbers that would; a task without samples names those
    that are there.
    """
    with pytest.raises(ValueError, match=message):
        Loader(Shards(folders["showo"]), **arguments)


# ---------------------------------------------------------------- memory

def anonymous():
    """Bytes of this process that no file backs, from Linux."""
    with open("/proc/self/smaps_rollup") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("Anonymous:"))


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="measured by /proc of Linux")
def test_memory_is_flat_on_a_shard_that_is_larger_than_the_allowance(tmp_path):
    """Checking and reading every sample of a 40 MB shard takes less than 8 MB of anonymous memory;
    the same bytes in an array are seen by this measurement.
    """
    n, tokenizer = 5000, make_tokenizer(grid=(64, 64))
    codes = torch.randint(7, (64, 64))
    write_shards(tmp_path, tokenizer, {"train": {"t2i": (("a", "", codes) for _ in range(n))}})
    size = (tmp_path / "train-t2i-00000.shard").stat().st_size
    assert size > 40e6
    warm = Loader(Shards(tmp_path, checksums=False), {"t2i": 10})
    warm.batches(0)
    before = anonymous()
    loader = Loader(Shards(tmp_path), {"t2i": 10}, drop=0)
    for step in range(n // 10):
        for i in loader.numbers("t2i", step, 0):
            loader.shards.sample("t2i", i)
        if step % 10 == 0:
            loader.batches(step)
    grown = anonymous() - before
    held = np.array(loader.shards.arrays["train", "t2i"][0])
    assert grown < 8e6 < 40e6 < anonymous() - before and held.nbytes > 40e6

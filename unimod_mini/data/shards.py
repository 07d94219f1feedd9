"""Token shards: a data set on disk that is never loaded, and a loader that resumes by one number.

    FOLDER/tokenizer.pt             torch.save of Tokenizer.state()
    FOLDER/dataset.json             counts by split and task, and what the data is; written last
    FOLDER/train-t2i-00000.shard .. held-mmu-00000.shard ..

A shard is a header of 4,096 bytes (JSON, padded with blanks) and a plain C-order little-endian
array, one record of fixed width a sample. It can be read without this package:

    header = json.loads(open(path, "rb").read(4096))
    array = numpy.memmap(path, header["dtype"], "r", 4096, tuple(header["shape"]))
    n_question, n_answer = array[i, :2]
    text = array[i, 2:2 + header["text_length"]]      # question ids, answer ids, zeros
    codes = array[i, 2 + header["text_length"]:]      # image codes, row by row; none for lm

The ids are those that Tokenizer's layouts take, so nothing is encoded again in training. t2i: the
question is the caption, there is no answer. mmu: question (up to where the answer begins:
Tokenizer.question_ids) and answer. lm: the question is the text.

Departures from the usual: no sampler state and no shuffle buffer. Sample number n of a task is a
function of the seed alone: epoch n // size, place n % size in that epoch's permutation (which takes
80 MB for ten million samples). What is random in a sample is seeded by its number.

Legend: n samples, S text columns, N image codes, h and w rows and columns of image codes.
"""

import hashlib
import json
import os
import unicodedata
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..atomic_files import json_text, save_data, whole_file, write_json
from ..console import progress_bar
from ..objectives import drop_prompts, mask_image_tokens
from ..plan import TASKS
from ..text_codecs import shorten
from ..tokenizer import Batch, Tokenizer

FORMAT, VERSION, HEADER = "unimod_mini shard", 2, 4096
SPLITS = ("train", "held")
PIECE = 2**20                      # bytes that are read or written at once


class Sample(NamedTuple):
    """Texts are str or tuples of ids when written, tuples of ids when read."""
    question: str | tuple          # the caption for t2i, the text for lm
    answer: str | tuple            # empty for t2i and lm
    codes: Tensor | None           # (h, w) long; None for lm


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """sha256 of all that its sequences depend on: words, codec weights, grid, budget .."""
    def as_plain(x: Tensor) -> list:
        array = x.detach().cpu().contiguous().numpy()
        data = array.astype(array.dtype.newbyteorder("<")).tobytes()
        return [str(x.dtype), list(x.shape), hashlib.sha256(data).hexdigest()]

    text = json.dumps(tokenizer.state(), sort_keys=True, default=as_plain)
    return hashlib.sha256(text.encode()).hexdigest()


def text_columns(tokenizer: Tokenizer, task: str) -> int:
    """S: the most text ids that a sample may have."""
    return tokenizer.room(task) + tokenizer.assistant_length(task)


def layout(tokenizer: Tokenizer, task: str, n: int) -> dict:
    """What the header of a shard says about its n records."""
    S, N = text_columns(tokenizer, task), 0 if task == "lm" else tokenizer.n_image
    small = max(tokenizer.vocab_size, S + 1) <= 2**16
    return {"dtype": "<u2" if small else "<u4", "shape": [n, 2 + S + N], "text_length": S,
            "grid": list(tokenizer.grid), "vocab_size": tokenizer.vocab_size}


# --- Writing ---

def write_shards(folder, tokenizer: Tokenizer, samples: dict, per_shard: int = 2**20,
                 about: dict | None = None) -> dict:
    """Write a whole data set; what an interrupted call left is written anew.

    samples: {split: {task: iterable of Sample or (question, answer, codes)}}, read once and never
    held; about: what else dataset.json says. Returns the counts, {split: {task: n}}.
    FileExistsError when the folder holds a finished data set, ValueError for a text over budget,
    codes that do not fit and an unknown split or task.
    """
    folder = Path(folder)
    if (folder / "dataset.json").exists():
        raise FileExistsError(f"{folder} holds a finished data set: choose another folder, or "
                              "delete this one")
    for split, tasks in samples.items():
        if split not in SPLITS or not set(tasks) <= set(TASKS):
            raise ValueError(f"splits are {', '.join(SPLITS)}, tasks {', '.join(TASKS)}, not "
                             f"{split!r}: {list(tasks)}")
    for split in SPLITS:
        for task in TASKS:
            for stale in folder.glob(f"{split}-{task}-*.shard*"):
                stale.unlink()
    about = json.loads(json_text(about or {}))             # first: refused before hours of writing
    save_data(folder / "tokenizer.pt", tokenizer.state())
    digest, counts = tokenizer_hash(tokenizer), {}
    for split, tasks in samples.items():
        counts[split] = {}
        for task, rows in tasks.items():
            counts[split][task] = write_task(folder, tokenizer, digest, split, task, rows,
                                             per_shard)
    write_json(folder / "dataset.json", {"counts": counts, **about})
    return counts


def write_task(folder: Path, tokenizer: Tokenizer, digest: str, split: str, task: str, samples,
               per_shard: int) -> int:
    """The shards of one split and task; returns how many samples they hold."""
    rows, total = (record(tokenizer, task, *sample) for sample in samples), 0
    for number, first in enumerate(rows):                  # the shard takes its other rows itself
        path = folder / f"{split}-{task}-{number:05d}.shard"
        header = {"format": FORMAT, "version": VERSION, "file": path.name, "task": task,
                  "split": split, "tokenizer": digest, **layout(tokenizer, task, 0)}
        total += write_shard(path, header, chain([first], islice(rows, per_shard - 1)))
    return total


def write_shard(path: Path, header: dict, rows) -> int:
    """Records and their header, completed by their number and hash -> a file.

    Returns the number.
    """
    digest = hashlib.sha256()
    with whole_file(path, "wb", buffering=PIECE) as file:
        file.write(b" " * HEADER)
        for count, row in enumerate(rows, start=1):
            data = np.array(row, header["dtype"]).tobytes()
            file.write(data)
            digest.update(data)
        shape = [count, header["shape"][1]]
        header = header | {"shape": shape, "sha256": digest.hexdigest()}
        file.seek(0)
        file.write(json.dumps(header).encode().ljust(HEADER))
        file.flush()
        os.fsync(file.fileno())
    return count


def record(tokenizer: Tokenizer, task: str, question, answer, codes: Tensor | None) -> list:
    """One sample -> n_question, n_answer, S text ids, N codes."""
    if answer and task != "mmu" or (codes is None) != (task == "lm"):
        raise ValueError(f"a sample of {task} has {'no' if task == 'lm' else 'a'} picture and "
                         f"{'an' if task == 'mmu' else 'no'} answer: {question!r}, {answer!r}")
    if isinstance(question, str):
        question, answer = text_ids(tokenizer, task, question, answer)
    padding = [0] * (text_columns(tokenizer, task) - len(question) - len(answer))
    row = [len(question), len(answer), *question, *answer, *padding]
    if codes is not None:
        tokenizer.image_ids(codes[None])                   # checks the grid and the range
        row += codes.flatten().tolist()
    return row


def text_ids(tokenizer: Tokenizer, task: str, question: str, answer: str) -> tuple[tuple, tuple]:
    """The ids of a sample's question and answer, as the layouts take them.

    ValueError for a text that does not fit, and for one that its ids do not give back but for case
    and blanks (Hugging Face's tokenizers read "<|endoftext|>" in a text as the token).
    """
    for text in (question, answer):
        ids = tokenizer.text.encode(text)
        back = tokenizer.text.decode(ids)
        if tokenizer.text.encode(back) != ids or letters(back) != letters(text):
            raise ValueError(f"the ids of {shorten(text)!r} give back {shorten(back)!r}: is a "
                             "special token in it?")
    tokenizer.check_text(task, question, answer)
    asked = tokenizer.question_ids(question) if task == "mmu" else tokenizer.text_ids(question)
    return tuple(asked), tuple(tokenizer.text_ids(answer))


def letters(text: str) -> str:
    """A text without its blanks, its case, and what Unicode writes in several ways."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


# --- Reading ---

class Shards:
    """A data set on disk, memory-mapped. Every file is checked first: header, size, hash.

    checksums=False leaves out the hashes, which take reading all bytes: enough for one process of
    a machine to do. FileNotFoundError when there is no finished data set, ValueError naming the
    file that is not what it should be.
    """

    def __init__(self, folder, checksums: bool = True):
        self.folder = Path(folder)
        for name in ("dataset.json", "tokenizer.pt"):
            if not (self.folder / name).is_file():
                raise FileNotFoundError(f"{self.folder / name} is missing: python -m "
                                        f"unimod_mini.prepare SOURCE {self.folder} makes a data "
                                        "set, or finishes one")
        self.tokenizer = read_tokenizer(self.folder / "tokenizer.pt")
        self.tokenizer_hash = tokenizer_hash(self.tokenizer)
        self.arrays = {}                                   # (split, task): arrays (n, 2 + S + N)
        paths = sorted(self.folder.glob("*.shard"))
        size = sum(path.stat().st_size for path in paths)
        with progress_bar(total=size, desc="checking shards", unit="B", unit_scale=True,
                          disable=size < 2**30) as bar:
            for path in paths:
                header = read_header(path, self.tokenizer, self.tokenizer_hash)
                shape = tuple(header["shape"])
                rows = np.memmap(path, header["dtype"], "r", HEADER, shape)
                arrays = self.arrays.setdefault((header["split"], header["task"]), [])
                arrays.append(np.asarray(rows))            # faster views than a memmap's
                if checksums:
                    check_hash(path, header["sha256"], bar)
        self.ends = {}                                     # (split, task): samples up to each array
        for key, arrays in self.arrays.items():
            self.ends[key] = np.cumsum([len(array) for array in arrays])
        self.about = self.read_about()

    def read_about(self) -> dict:
        """dataset.json. ValueError when the shards do not hold what it counted."""
        path = self.folder / "dataset.json"
        try:
            about = json.loads(path.read_text(encoding="utf-8"))
            counts = {(split, task): n for split, tasks in about["counts"].items()
                      for task, n in tasks.items()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} is not the description of a data set ({error!r}): prepare it "
                             "again") from error
        for split, task in counts.keys() | self.arrays.keys():
            there, said = self.count(task, split), counts.get((split, task), 0)
            if there != said:
                raise ValueError(f"{path} counts {said} samples of {split}-{task}, "
                                 f"{split}-{task}-*.shard hold {there}: a shard is missing or "
                                 "does not belong here")
        return about

    def count(self, task: str, split: str = "train") -> int:
        """Samples of a task; 0 when there is none."""
        return int(self.ends[split, task][-1]) if (split, task) in self.ends else 0

    def sample(self, task: str, index: int, split: str = "train") -> Sample:
        """Sample number `index` in the order of the files. IndexError outside [0, count)."""
        if not 0 <= index < self.count(task, split):
            raise IndexError(f"{self.folder}: sample {index} of {split}-{task}, there are "
                             f"{self.count(task, split)}")
        ends = self.ends[split, task]
        number = int(np.searchsorted(ends, index, "right"))
        row = self.arrays[split, task][number][index - ends[number]]   # counted from its end
        row = row.astype(np.int64)
        n_question, n_answer = int(row[0]), int(row[1])
        text = tuple(row[2:2 + n_question + n_answer].tolist())
        codes = None
        if task != "lm":
            codes = torch.from_numpy(row[2 + text_columns(self.tokenizer, task):])
            codes = codes.view(self.tokenizer.grid)                            # (h, w)
        return Sample(text[:n_question], text[n_question:], codes)

    def texts(self, sample: Sample) -> tuple[str, str]:
        """Question and answer of a sample, to show them."""
        decode, assistant = self.tokenizer.text.decode, self.tokenizer.assistant
        question = decode(sample.question).removesuffix(" " + assistant).removesuffix(assistant)
        return question, decode(sample.answer)


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a file; ValueError when it is none."""
    try:
        return Tokenizer.from_state(torch.load(path, map_location="cpu", weights_only=True))
    except ImportError:
        raise
    except Exception as error:                             # torch advises to load it unsafely
        raise ValueError(f"{path} is not the tokenizer of a data set: prepare it again") from error


def read_header(path: Path, tokenizer: Tokenizer, digest: str) -> dict:
    """The header of a shard of this tokenizer; ValueError, naming the file, when it is another."""
    with open(path, "rb") as file:
        head = file.read(HEADER)
    try:
        header = json.loads(head)
        is_shard = header["format"] == FORMAT
    except (ValueError, TypeError, KeyError):
        is_shard = False
    if not is_shard:
        raise ValueError(f"{path} is not a shard of unimod_mini: prepare the data again")
    if header.get("version") != VERSION:
        raise ValueError(f"{path} has version {header.get('version')} of the format, this program "
                         f"reads {VERSION}: prepare the data again, or use the program that wrote "
                         "it")
    if header.get("tokenizer") != digest:
        raise ValueError(f"{path} was written with another tokenizer than tokenizer.pt beside it: "
                         "the ids would mean other words and patches. Keep the files of one data "
                         "set together")
    if header["file"] != path.name:
        raise ValueError(f"{path} was written as {header['file']}: name it so again")
    (n, width), item = header["shape"], np.dtype(header["dtype"]).itemsize
    size = HEADER + n * width * item
    if path.stat().st_size != size:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, its header says {size}: cut "
                         "short or added to, copy it again")
    return header


def check_hash(path: Path, wanted: str, bar) -> None:
    """ValueError unless the array's bytes have this sha256; read in pieces, memory stays flat."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(HEADER)
        while piece := file.read(PIECE):
            digest.update(piece)
            bar.update(len(piece))
    if digest.hexdigest() != wanted:
        raise ValueError(f"{path} was altered: its bytes do not have the hash in its header. Copy "
                         "it again")


# --- In training ---

class Loader:
    """The samples of step 0, 1, .. for one of `world` ranks: a function of the step alone.

    counts: {task: samples in a step, over all ranks and accumulation steps}; drop: share of
    captions that are emptied, for guidance. Neither `world` nor `accumulate` changes the samples
    of a step. ValueError for counts that do not divide, a task that has no sample, a rank outside
    the world.
    """

    def __init__(self, shards: Shards, counts: dict, seed: int = 0, rank: int = 0, world: int = 1,
                 accumulate: int = 1, drop: float = 0.1, split: str = "train"):
        if min(world, accumulate) < 1 or not 0 <= rank < world or not 0 <= drop <= 1:
            raise ValueError(f"rank {rank} of {world}, accumulate {accumulate}, drop {drop}: "
                             "expected 0 <= rank < world, accumulate of 1 or more, 0 <= drop <= 1")
        for task, n in counts.items():
            check_count(shards, task, split, n, world, accumulate)
        self.counts = {task: n for task, n in counts.items() if n}
        if not self.counts:
            raise ValueError(f"a step without samples: counts are {counts}")
        self.shards, self.seed, self.drop, self.split = shards, seed, drop, split
        self.rank, self.world, self.accumulate = rank, world, accumulate
        self.orders = {}                                   # task: (epoch, its permutation)

    def batches(self, step: int) -> list:
        """`accumulate` dicts {task: Batch} of a step; Batch tensors are on the CPU."""
        parts = []
        for part in range(self.accumulate):
            parts.append({task: self.lay_out(task, self.numbers(task, step, part))
                          for task in self.counts})
        return parts

    def numbers(self, task: str, step: int, part: int) -> range:
        """The sample numbers of this rank: accumulation cuts a step in parts, ranks cut a part."""
        each = self.counts[task] // (self.world * self.accumulate)
        start = step * self.counts[task] + (part * self.world + self.rank) * each
        return range(start, start + each)

    def index(self, task: str, number: int) -> int:
        """Sample number -> its index in the shards: epochs of one permutation each."""
        size = self.shards.count(task, self.split)
        epoch, place = divmod(number, size)
        if self.orders.get(task, (None,))[0] != epoch:
            key = f"{self.seed} {task} {epoch}".encode()
            self.orders[task] = epoch, np.random.default_rng(list(key)).permutation(size)
        return int(self.orders[task][1][place])

    def lay_out(self, task: str, numbers: range) -> Batch:
        """Samples by number -> a batch; what is random in a sample depends on its number alone."""
        tokenizer = self.shards.tokenizer
        samples = [self.shards.sample(task, self.index(task, n), self.split) for n in numbers]
        questions, answers, codes = map(list, zip(*samples))
        if task == "lm":
            return tokenizer.lm(questions)
        if task == "mmu":
            return tokenizer.mmu(questions, answers, torch.stack(codes))
        captions, generators = [], []
        for number, caption in zip(numbers, questions):
            rng = Random(f"{self.seed} {task} {number}")
            captions += drop_prompts([caption], self.drop, rng)
            generators.append(torch.Generator().manual_seed(rng.getrandbits(63)))
        batch = tokenizer.t2i(captions, torch.stack(codes))
        if tokenizer.backbone == "emu3":
            return batch
        return mask_image_tokens(batch, tokenizer, generators)

    def read_ahead(self, start: int, steps: int, ahead: int = 2):
        """(step, batches(step)) for start <= step < steps, prepared in a thread `ahead` of them."""
        with ThreadPoolExecutor(1) as pool:
            first = range(start, min(start + ahead, steps))
            jobs = deque(pool.submit(self.batches, step) for step in first)
            try:
                for step in range(start, steps):
                    batches = jobs.popleft().result()      # an error in the thread is raised here
                    if step + ahead < steps:
                        jobs.append(pool.submit(self.batches, step + ahead))
                    yield step, batches
            finally:
                pool.shutdown(cancel_futures=True)


def check_count(shards: Shards, task: str, split: str, n: int, world: int, accumulate: int) -> None:
    """ValueError for n samples of a task in a step that do not divide, or that are not there."""
    parts = world * accumulate
    if n < 0 or n % parts:
        low = max(n // parts, 1) * parts
        raise ValueError(f"{n} samples of {task} in a step do not divide among {world} ranks x "
                         f"{accumulate} accumulation steps: {low} or {low + parts} would do")
    if n and not shards.count(task, split):
        there = [f"{ends[-1]} of {s}-{t}" for (s, t), ends in shards.ends.items()]
        raise ValueError(f"{shards.folder} has no sample of {task} in its split {split}; it has "
                         + (", ".join(there) or "none at all: prepare the data again"))

"""Token shards: a data set on disk that is never loaded, and a loader that needs one number to resume.

    FOLDER/tokenizer.pt             torch.save of Tokenizer.state()
    FOLDER/dataset.json             counts by split and task, and what the data is; written last
    FOLDER/train-t2i-00000.shard .. held-mmu-00000.shard ..

A shard is a header of 4,096 bytes (JSON, padded with blanks) and a plain C-order little-endian array, one record of
fixed width a sample. It can be read without this package:

    header = json.loads(open(path, "rb").read(4096))
    array = numpy.memmap(path, header["dtype"], "r", 4096, tuple(header["shape"]))
    n_question, n_answer = array[i, :2]
    text = array[i, 2:2 + header["text_length"]]      # question ids, answer ids, zeros
    codes = array[i, 2 + header["text_length"]:]      # image codes from 0, row by row: header["grid"]; none for lm

t2i: the question is the caption, there is no answer. mmu: question and answer. lm: the question is the text.

Departures from the usual: no sampler state and no shuffle buffer. Sample number n of a task is a pure function of the
seed: epoch n // size, place n % size, sent through a permutation that is computed instead of stored (a Feistel network,
Luby and Rackoff 1988, with cycle walking, Black and Rogaway 2002). What is random in a sample is seeded by its number.

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
from ..text_codecs import cut
from ..tokenizer import Batch, Tokenizer

FORMAT, VERSION, HEADER = "unimod_mini shard", 1, 4096
SPLITS = ("train", "held")
PIECE = 2**20                      # bytes that are read or written at once
ROUNDS = 8                         # of the Feistel network


class Sample(NamedTuple):
    question: str                  # the caption for t2i, the text for lm
    answer: str                    # "" for t2i and lm
    codes: Tensor | None           # (h, w) long; None for lm


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """sha256 of all that a tokenizer's sequences and pictures depend on: words, codec weights, grid, budget, .."""
    def plain(x: Tensor) -> list:
        array = x.detach().cpu().contiguous().numpy()
        data = array.astype(array.dtype.newbyteorder("<")).tobytes()
        return [str(x.dtype), list(x.shape), hashlib.sha256(data).hexdigest()]
    return hashlib.sha256(json.dumps(tokenizer.state(), sort_keys=True, default=plain).encode()).hexdigest()


def text_columns(tokenizer: Tokenizer, task: str) -> int:
    """S of a shard: the text budget, and for lm all that its layout takes."""
    return tokenizer.room("lm") if task == "lm" else tokenizer.text_length


# --------------------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------------------

def write_shards(folder, tokenizer: Tokenizer, samples: dict, per_shard: int = 2**20, about=None) -> dict:
    """Write a whole data set; what an interrupted call left is written anew.

    samples: {split: {task: iterable of Sample or (question, answer, codes)}}, read once and never held; about: a dict
    of what else dataset.json says. Returns the counts, {split: {task: n}}. Raises FileExistsError when the folder holds
    a finished data set, ValueError for a text over budget, codes that do not fit and an unknown split or task.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "dataset.json").exists():
        raise FileExistsError(f"{folder} holds a finished data set: choose another folder, or delete this one")
    for split, tasks in samples.items():
        if split not in SPLITS or not set(tasks) <= set(TASKS):
            raise ValueError(f"splits are {', '.join(SPLITS)}, tasks {', '.join(TASKS)}, not {split!r}: {list(tasks)}")
    for stale in (path for split in SPLITS for task in TASKS for path in folder.glob(f"{split}-{task}-*.shard*")):
        stale.unlink()
    about = json_text(about or {})                         # first: what is no JSON is refused before hours of writing
    save_data(folder / "tokenizer.pt", tokenizer.state())
    digest = tokenizer_hash(tokenizer)
    counts = {split: {task: write_task(folder, tokenizer, digest, split, task, rows, per_shard)
                      for task, rows in tasks.items()} for split, tasks in samples.items()}
    write_json(folder / "dataset.json", {"counts": counts, **json.loads(about)})
    return counts


def write_task(folder: Path, tokenizer: Tokenizer, digest: str, split: str, task: str, samples, per_shard: int) -> int:
    """The shards of one split and task; returns how many samples they hold."""
    rows = (record(tokenizer, task, *sample) for sample in samples)
    total = 0
    for number, first in enumerate(rows):                                    # the file takes its other rows itself
        path = folder / f"{split}-{task}-{number:05d}.shard"
        header = {"format": FORMAT, "version": VERSION, "file": path.name, "task": task, "split": split,
                  "tokenizer": digest, **layout(tokenizer, task)}
        total += write_shard(path, header, chain([first], islice(rows, per_shard - 1)))
    return total


def layout(tokenizer: Tokenizer, task: str, n: int = 0) -> dict:
    """What the header of a shard says about its n records."""
    S, N = text_columns(tokenizer, task), 0 if task == "lm" else tokenizer.n_image
    return {"dtype": "<u2" if max(tokenizer.vocab_size, S + 1) <= 2**16 else "<u4", "shape": [n, 2 + S + N],
            "text_length": S, "grid": list(tokenizer.grid), "vocab_size": tokenizer.vocab_size}


def write_shard(path: Path, header: dict, rows) -> int:
    """Records and their header, which is completed by their number and checksum -> one file; returns the number."""
    seal = hashlib.sha256()
    with whole_file(path, "wb", buffering=PIECE) as file:
        file.write(b" " * HEADER)
        for count, row in enumerate(rows, start=1):
            data = np.array(row, header["dtype"]).tobytes()
            file.write(data), seal.update(data)
        header = header | {"shape": [count, header["shape"][1]], "sha256": seal.hexdigest()}
        file.seek(0)
        file.write(json.dumps(header).encode().ljust(HEADER))
        file.flush(), os.fsync(file.fileno())
    return count


def text_ids(tokenizer: Tokenizer, task: str, question: str, answer: str) -> tuple[list, list]:
    """The ids of a sample's question and answer. ValueError for a text that does not fit, or that ids do not give back
    but for case and blanks (Hugging Face's tokenizers read "<|endoftext|>" in a text as the token)."""
    ids = tokenizer.text.encode(question), tokenizer.text.encode(answer)
    for text, those in zip((question, answer), ids):
        back = tokenizer.text.decode(those)
        if tokenizer.text.encode(back) != those or letters(back) != letters(text):
            raise ValueError(f"the ids of {cut(text)!r} give back {cut(back)!r}: is a special token in it?")
    tokenizer.check_text(task, question, answer)
    tokenizer.fit_text(sum(ids, []), text_columns(tokenizer, task), f"{question} {answer}".strip())
    return ids


def letters(text: str) -> str:
    """A text without its blanks, its case, and what Unicode writes in several ways."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def record(tokenizer: Tokenizer, task: str, question, answer, codes: Tensor | None) -> list:
    """One sample -> n_question, n_answer, S text ids, N codes. question and answer: texts, or what text_ids made of them."""
    if answer and task != "mmu" or (codes is None) != (task == "lm"):
        raise ValueError(f"a sample of {task} has {'no picture' if task == 'lm' else 'a picture'} and "
                         f"{'an' if task == 'mmu' else 'no'} answer: {question!r}, {answer!r}")
    asked, answered = (question, answer) if isinstance(question, list) else text_ids(tokenizer, task, question, answer)
    text = asked + answered
    if codes is not None:
        tokenizer.image_ids(codes[None])                                     # checks the grid and the range
    padding = [0] * (text_columns(tokenizer, task) - len(text))
    return [len(asked), len(answered), *text, *padding, *([] if codes is None else codes.flatten().tolist())]


# --------------------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------------------

class Shards:
    """A data set on disk, memory-mapped. Every file is checked before anything is read: header, name, size, checksum.

    checksums=False leaves out the last, which reads all bytes: enough for one process of a machine to do. Raises
    FileNotFoundError when there is no finished data set, ValueError naming the file that is not what it should be.
    """

    def __init__(self, folder, checksums: bool = True):
        self.folder = Path(folder)
        for name in ("dataset.json", "tokenizer.pt"):
            if not (self.folder / name).is_file():
                raise FileNotFoundError(f"{self.folder / name} is missing: python -m unimod_mini.prepare SOURCE "
                                        f"{self.folder} makes a data set, or finishes one")
        self.tokenizer = read_tokenizer(self.folder / "tokenizer.pt")
        self.tokenizer_hash = tokenizer_hash(self.tokenizer)
        self.arrays = {}                                   # (split, task) -> arrays on disk, each (n, 2 + S + N)
        paths = sorted(self.folder.glob("*.shard"))
        size = sum(path.stat().st_size for path in paths)
        with progress_bar(total=size, desc="checking shards", unit="B", unit_scale=True, disable=size < 2**30) as bar:
            for path in paths:
                header = read_header(path, self.tokenizer, self.tokenizer_hash)
                rows = np.memmap(path, header["dtype"], "r", HEADER, tuple(header["shape"]))
                self.arrays.setdefault((header["split"], header["task"]), []).append(np.asarray(rows))   # faster views
                if checksums:
                    check_seal(path, header["sha256"], bar)
        self.ends = {key: np.cumsum([len(array) for array in arrays]) for key, arrays in self.arrays.items()}
        self.check_counts()

    def check_counts(self) -> None:
        """ValueError when the shards do not hold what dataset.json counted."""
        path = self.folder / "dataset.json"
        try:
            self.about = json.loads(path.read_text(encoding="utf-8"))
            counts = {(split, task): n for split, tasks in self.about["counts"].items() for task, n in tasks.items()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} is not the description of a data set ({error!r}): prepare it again") from error
        for split, task in counts.keys() | self.arrays.keys():
            held, said = self.count(task, split), counts.get((split, task), 0)
            if held != said:
                raise ValueError(f"{path} counts {said} samples of {split}-{task}, {split}-{task}-*.shard hold {held}: "
                                 f"a shard is missing or does not belong here")

    def count(self, task: str, split: str = "train") -> int:
        """Samples of a task; 0 when there is none."""
        return int(self.ends[split, task][-1]) if (split, task) in self.ends else 0

    def sample(self, task: str, index: int, split: str = "train") -> Sample:
        """Sample number `index` in the order of the files. IndexError outside [0, count)."""
        if not 0 <= index < self.count(task, split):
            raise IndexError(f"{self.folder}: sample {index} of {split}-{task}, there are {self.count(task, split)}")
        number = int(np.searchsorted(self.ends[split, task], index, "right"))
        from_end = index - self.ends[split, task][number]                    # -1 is the last record of that shard
        row = self.arrays[split, task][number][from_end].astype(np.int64)
        asked, answered, S = int(row[0]), int(row[1]), text_columns(self.tokenizer, task)
        text = row[2:2 + asked + answered].tolist()
        codes = None if task == "lm" else torch.from_numpy(row[2 + S:]).view(self.tokenizer.grid)        # (h, w)
        return Sample(self.tokenizer.text.decode(text[:asked]), self.tokenizer.text.decode(text[asked:]), codes)


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a file; ValueError when it is none."""
    try:
        return Tokenizer.from_state(torch.load(path, map_location="cpu", weights_only=True))
    except ImportError:
        raise
    except Exception as error:                             # torch's own text advises to load it unsafely
        raise ValueError(f"{path} is not the tokenizer of a data set: prepare it again") from error


def read_header(path: Path, tokenizer: Tokenizer, digest: str) -> dict:
    """The header of a shard of this tokenizer; ValueError, naming the file, when it is anything else."""
    with open(path, "rb") as file:
        head = file.read(HEADER)
    try:
        header = json.loads(head)
        if header["format"] != FORMAT:
            raise ValueError(f"format {header['format']!r}")
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not a shard of unimod_mini: prepare the data again") from error
    if header.get("version") != VERSION:
        raise ValueError(f"{path} has version {header.get('version')} of the format, this program reads {VERSION}: "
                         "prepare the data again, or use the program that wrote it")
    if header.get("tokenizer") != digest:
        raise ValueError(f"{path} was written with another tokenizer than tokenizer.pt beside it: the ids would mean "
                         "other words and patches. Keep the files of one data set together")
    check_layout(path, header, tokenizer)
    return header


def check_layout(path: Path, header: dict, tokenizer: Tokenizer) -> None:
    """ValueError, naming the file, unless header, name and size are what write_shard makes with this tokenizer."""
    split, task = header.get("split"), header.get("task")
    if header.get("file") != path.name or task not in TASKS or not path.name.startswith(f"{split}-{task}-"):
        raise ValueError(f"{path} was written as {header.get('file')}, samples of {split}-{task}: name it so again")
    shape = header.get("shape")
    n = shape[0] if isinstance(shape, list) and shape and isinstance(shape[0], int) else 0
    wanted = layout(tokenizer, task, n)
    for key, value in wanted.items():
        if header.get(key) != value:
            raise ValueError(f"{path}: the header's {key} is {header.get(key)}, expected {value}: prepare it again")
    size = HEADER + n * wanted["shape"][1] * np.dtype(wanted["dtype"]).itemsize
    if path.stat().st_size != size:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, its header says {size}: cut short or added to, copy "
                         "it again")


def check_seal(path: Path, seal: str, bar) -> None:
    """ValueError unless the array's bytes have this sha256. Read in pieces: the memory in use stays flat."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(HEADER)
        while piece := file.read(PIECE):
            digest.update(piece)
            bar.update(len(piece))
    if digest.hexdigest() != seal:
        raise ValueError(f"{path} was altered: its bytes do not have the checksum in its header. Copy it again")


# --------------------------------------------------------------------------------------------------------------
# In training
# --------------------------------------------------------------------------------------------------------------

class Loader:
    """The samples of step 0, 1, .. for one of `world` ranks, a pure function of the step and these arguments.

    counts: {task: samples in a step, over all ranks and accumulation steps}; drop: share of captions that are emptied,
    so that the model also learns to draw without one. Neither `world` nor `accumulate` changes the samples of a step.
    Raises ValueError for counts that do not divide, a task that has no sample, a rank outside the world.
    """

    def __init__(self, shards: Shards, counts: dict, seed: int = 0, rank: int = 0, world: int = 1, accumulate: int = 1,
                 drop: float = 0.1, split: str = "train"):
        if min(world, accumulate) < 1 or not 0 <= rank < world or not 0 <= drop <= 1:
            raise ValueError(f"rank {rank} of {world}, accumulate {accumulate}, drop {drop}: expected 0 <= rank < "
                             "world, accumulate of 1 or more, 0 <= drop <= 1")
        parts = world * accumulate
        for task, n in counts.items():
            if n < 0 or n % parts:
                low = n // parts * parts if n > parts else parts
                raise ValueError(f"{n} samples of {task} in a step do not divide among {world} ranks x {accumulate} "
                                 f"accumulation steps: {low} or {low + parts} would do")
            if n and not shards.count(task, split):
                there = ", ".join(f"{ends[-1]} of {s}-{t}" for (s, t), ends in shards.ends.items())
                raise ValueError(f"{shards.folder} has no sample of {task} in its split {split}; it has "
                                 + (there or "none at all: prepare the data again"))
        if not any(counts.values()):
            raise ValueError(f"a step without samples: counts are {counts}")
        self.shards, self.seed, self.rank, self.world, self.drop, self.split = shards, seed, rank, world, drop, split
        self.counts, self.accumulate = {task: n for task, n in counts.items() if n}, accumulate

    def batches(self, step: int) -> list:
        """`accumulate` dicts {task: Batch} of a step; Batch tensors are on the CPU."""
        return [{task: self.lay_out(task, self.numbers(task, step, part)) for task in self.counts}
                for part in range(self.accumulate)]

    def numbers(self, task: str, step: int, part: int) -> range:
        """The sample numbers of this rank: accumulation steps cut a step into parts, ranks cut a part."""
        each = self.counts[task] // (self.world * self.accumulate)
        start = step * self.counts[task] + (part * self.world + self.rank) * each
        return range(start, start + each)

    def lay_out(self, task: str, numbers: range) -> Batch:
        """Samples by number -> one batch; what is random in a sample depends on its number alone."""
        tokenizer, size = self.shards.tokenizer, self.shards.count(task, self.split)
        index = shuffled(np.arange(numbers.start, numbers.stop), size, f"{self.seed} {task}")
        questions, answers, codes = zip(*(self.shards.sample(task, i, self.split) for i in index.tolist()))
        if task == "lm":
            return tokenizer.lm(questions)
        if task == "mmu":
            return tokenizer.mmu(questions, answers, torch.stack(codes))
        dice = [Random(f"{self.seed} {task} {number}") for number in numbers]
        captions = [drop_prompts([text], self.drop, own)[0] for text, own in zip(questions, dice)]
        batch = tokenizer.t2i(captions, torch.stack(codes))
        if tokenizer.backbone == "emu3":
            return batch
        return mask_image_tokens(batch, tokenizer, [torch.Generator().manual_seed(own.getrandbits(63)) for own in dice])

    def read_ahead(self, start: int, steps: int, ahead: int = 2):
        """(step, batches(step)) for start <= step < steps, prepared in a thread, `ahead` steps before they are used."""
        with ThreadPoolExecutor(1) as pool:
            jobs = deque(pool.submit(self.batches, step) for step in range(start, min(start + ahead, steps)))
            try:
                for step in range(start, steps):
                    batches = jobs.popleft().result()      # an error in the thread is raised here
                    if step + ahead < steps:
                        jobs.append(pool.submit(self.batches, step + ahead))
                    yield step, batches
            finally:
                pool.shutdown(cancel_futures=True)


def shuffled(numbers, size: int, key: str):
    """Sample numbers (n,) of an endless sequence of epochs -> indices in [0, size), (n,) int64; O(1) memory.

    Each epoch of `size` numbers is one permutation, drawn by (key, epoch). A Feistel network permutes the 4^b >= size
    numbers of 2 b bits: (l, r) -> (r, l xor f(r)) is undone by (l, r) -> (r xor f(l), l), whatever f. A result outside
    [0, size) goes through again until it falls inside, which leaves a permutation of [0, size).
    """
    epoch, x = np.divmod(numbers.astype(np.uint64), np.uint64(size))
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))                                     # b
    low = (np.uint64(1) << half) - np.uint64(1)
    base = np.frombuffer(hashlib.sha256(key.encode()).digest()[:8], "<u8")
    keys = mix(base + mix(epoch))
    outside = np.ones(len(x), bool)
    while outside.any():
        left, right = x[outside] >> half, x[outside] & low
        for turn in range(ROUNDS):
            left, right = right, left ^ (mix(right + mix(keys[outside] + np.uint64(turn))) & low)
        x[outside] = left << half | right
        outside = x >= size
    return x.astype(np.int64)


def mix(x):
    """uint64 (n,) -> uint64 (n,), a bijection that looks random: the last steps of SplitMix64 (Steele et al. 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)

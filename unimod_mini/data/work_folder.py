"""The working folder of prepare.py: pictures as they were decoded, in chunks that are finished or
not there.

    records-000000.jsonl   one line an entry; written last, it marks the chunk as finished
    pixels-000000.npy      uint8 (m, S, S, 3), the pictures that no entry before had; int32
                           (m, h, w) if they are codes
    codes-000000.npy       uint16 or int32 (m, h, w), the same pictures as the codec encodes them

A record is {"key", "skipped": why} or {"key", "picture": number, "pixels": hash, "split", "kind",
"texts": [[task, question, answer], ..]}. Reading goes on behind the last finished chunk, with what
the finished ones have seen.

Legend: m pictures in a chunk, S pixels a side, h and w rows and columns of image codes.
"""

import contextlib
import hashlib
import json
import multiprocessing
import signal
from bisect import bisect_right
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..atomic_files import whole_file
from ..console import progress_bar
from .readers import Item, decode, hashed_share, picture_type

CHUNK = 1024                       # entries
OPEN = 64                          # arrays that are kept open, a file descriptor each


@contextlib.contextmanager
def pool_map(workers: int):
    """map over processes, for a list of jobs at a time; in this process for one worker.

    ValueError if one is killed.
    """
    if workers == 1:
        yield map
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy torch's threads in any state
    pool = ProcessPoolExecutor(workers, context, signal.signal, (signal.SIGINT, signal.SIG_IGN))
    try:
        yield partial(pool.map, chunksize=16)
    except BrokenProcessPool as error:
        raise ValueError("a process that read pictures was killed, for lack of memory perhaps: the "
                         "same command goes on, with fewer --workers if need be") from error
    finally:
        pool.shutdown(cancel_futures=True)


class Chunks:
    """What is finished in a working folder."""

    def __init__(self, folder: Path):
        self.folder, self.open = folder, {}                # open: (kind, chunk) -> memmap
        self.starts = [0]  # number of the first picture of each chunk, and of the next
        while self.path("records", len(self.starts) - 1).exists():
            self.starts.append(self.starts[-1] + len(self.array("pixels", len(self.starts) - 1)))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def path(self, kind: str, chunk: int) -> Path:
        return self.folder / f"{kind}-{chunk:06d}.{'jsonl' if kind == 'records' else 'npy'}"

    def array(self, kind: str, chunk: int):
        """The pictures of a chunk, memory-mapped."""
        if (kind, chunk) not in self.open:
            if len(self.open) == OPEN:
                del self.open[next(iter(self.open))]       # the one that was opened first
            self.open[kind, chunk] = np.load(self.path(kind, chunk), mmap_mode="r")
        return self.open[kind, chunk]

    def picture(self, kind: str, number: int) -> Tensor:
        """Pixels (S, S, 3) or codes (h, w) of a picture."""
        chunk = bisect_right(self.starts, number) - 1
        return torch.from_numpy(np.array(self.array(kind, chunk)[number - self.starts[chunk]]))

    def records(self):
        """Every record, in the order of the sources."""
        for chunk in range(len(self)):
            with open(self.path("records", chunk), encoding="utf-8") as file:
                yield from map(json.loads, file)

    def used(self):
        """The records that have a picture."""
        return (record for record in self.records() if "skipped" not in record)

    def save(self, kind: str, chunk: int, array) -> None:
        with whole_file(self.path(kind, chunk), "wb") as file:
            np.save(file, array)

    def pass_over(self, entries) -> None:
        """Takes from an iterator the entries that are finished.

        ValueError when others were read before.
        """
        for record in self.records():
            now = change_of(record, next(entries, None))
            if now is not None:
                raise ValueError(f"the source changed since {self.folder.parent} was begun, "
                                 f"{record['key']} is now {now}: --changed anew begins again, or "
                                 "choose another folder")

    def read(self, entries, size: int, held: float, workers: int,
             n_codes: int | None = None) -> None:
        """Entries (readers.py) -> the chunks that are missing.

        held: share of the pictures that is held out, where an entry does not say itself on which
        side it is; n_codes: pictures are codes below this, None: pixels.
        """
        dtype, shape = picture_type(size, n_codes)
        memory = Memory(self, held)
        self.pass_over(entries)
        bar = progress_bar(desc="pictures", unit="picture", initial=self.starts[-1])
        with pool_map(workers) as map_, bar:
            while chunk := list(islice(entries, CHUNK)):
                jobs = [(entry, size, n_codes) for entry in chunk if isinstance(entry, Item)]
                decoded, records, pixels = iter(map_(decode, jobs)), [], []
                for entry in chunk:
                    picture = next(decoded) if isinstance(entry, Item) else entry.why
                    if isinstance(picture, str):
                        records.append({"key": entry.key, "skipped": picture})
                    else:
                        records.append(memory.record(entry, picture, self.starts[-1], pixels))
                    bar.update()
                self.append(records, np.frombuffer(b"".join(pixels), dtype).reshape(-1, *shape))

    def append(self, records: list, pixels) -> None:
        """One more chunk; pixels: (m, S, S, 3), or codes."""
        self.save("pixels", len(self), pixels)
        with whole_file(self.path("records", len(self))) as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
        self.starts.append(self.starts[-1] + len(pixels))


def change_of(record: dict, entry) -> str | None:
    """What stands now in the place of what was read; None: the same."""
    if entry is None:
        return "its end"
    if entry.key != record["key"]:
        return entry.key
    there = getattr(entry, "texts", [])
    for text in record.get("texts", ()):
        if tuple(map(str.strip, text)) not in there:
            return "another text"
    return None


class Memory:
    """Which pictures and which texts of them have been seen: about 200 bytes a sample."""

    def __init__(self, chunks: Chunks, held: float):
        self.held, self.pictures, self.texts = held, {}, set()  # pictures: hash -> (number, split)
        for record in chunks.used():
            self.pictures.setdefault(record["pixels"], (record["picture"], record["split"]))
            self.texts.update(hash((record["pixels"], *text)) for text in record["texts"])

    def record(self, item: Item, picture: bytes, start: int, pixels: list) -> dict:
        """What is kept of an item.

        Its picture is added to `pixels`, the chunk that begins with number `start`, unless it was
        seen before: then it keeps its number and its split, and gets the new texts alone.
        """
        digest = hashlib.sha256(picture).hexdigest()[:32]
        if digest not in self.pictures:
            is_held = hashed_share("split", item.key) < self.held
            split = item.split or ("held" if is_held else "train")
            self.pictures[digest] = start + len(pixels), split
            pixels.append(picture)
        number, split = self.pictures[digest]
        texts = []
        for text in item.texts:
            key = hash((digest, *text))
            if key not in self.texts:
                self.texts.add(key)
                texts.append(text)
        return {"key": item.key, "picture": number, "pixels": digest, "split": split,
                "kind": item.kind, "texts": texts}

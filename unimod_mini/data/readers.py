"""Pictures with captions or questions, one reader a format, all as one stream.

    folder with metadata.jsonl     {"file_name": "a/1.jpg", "text": "a sleeping cat"}, one a line
    folder with captions.csv       the columns file_name and text
    folder of .tar, or one .tar    WebDataset as img2dataset writes it: 000000001.jpg, .txt, .json
    questions.json or .jsonl       LLaVA: {"image": .., "conversations": [{"from": "human",
                                   "value": "<image> .."}, ..]}

A picture is an image file or, when codes are asked for, an .npy of integers (h, w), its codes in a
tokenizer that is not here. A caption gives two samples, draw it and describe it; a conversation
gives one sample a turn. Departure from the usual: what cannot be used is part of the stream
(`Skipped`), so that an entry has the same number whenever it is read.
"""

import contextlib
import csv
import hashlib
import io
import os
import tarfile
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..image_codecs import load_codes
from ..pictures import read_image
from ..text_codecs import shorten
from .image_folder import METADATA, _parse_line, check_row, parse_json

DESCRIBE = "describe ?"
QUESTIONS = (".json", ".jsonl")
SUFFIXES = {False: ("jpg", "jpeg", "png", "webp", "gif", "bmp"), True: ("npy",)}   # True: codes
ACCEPTED = ("emoji, a folder with metadata.jsonl or captions.csv, a folder of .tar files, a .tar "
            "file, or a LLaVA .json or .jsonl of questions")


class Slice(NamedTuple):
    """Bytes of a file, such as a picture in a tar."""
    path: Path
    offset: int
    size: int


class Item(NamedTuple):
    key: str                       # names the picture, whatever folder the source lies in
    picture: object                # Path, Slice, or uint8 array (H, W, 3)
    texts: list                    # (task, question, answer)
    split: str | None = None       # None: by the hash of the key
    kind: str = ""                 # what a held-out sample tests


class Skipped(NamedTuple):
    key: str
    why: str


def hashed_share(*key) -> float:
    """A number in [0, 1) that is the same for the same key on every machine."""
    name = "\0".join(key).encode(errors="surrogatepass")   # a file's name need not be UTF-8
    return int.from_bytes(hashlib.sha256(name).digest()[:8]) / 2**64


def captioned(key: str, picture, text: str) -> Item:
    """A picture to draw from its caption, without blanks around it, and to describe by it."""
    text = text.strip()
    return Item(key, picture, [("t2i", text, ""), ("mmu", DESCRIBE, text)])


def read_source(source: str, image_root: str | None = None, codes: bool = False):
    """The stream of a source: an iterator of Item and Skipped.

    ValueError or FileNotFoundError when it is no source.
    """
    path = Path(source)
    if path.is_dir():
        if (path / METADATA).is_file():
            return image_folder(path)
        if (path / "captions.csv").is_file():
            return captions_csv(path)
        if tars := sorted(path.glob("*.tar")):
            return chain.from_iterable(webdataset(tar, codes) for tar in tars)
    elif not path.exists():
        raise FileNotFoundError(f"{source} does not exist; a source is {ACCEPTED}")
    elif path.suffix == ".tar":
        return webdataset(path, codes)
    elif path.suffix in QUESTIONS:
        return conversations(path, Path(image_root or path.parent))
    raise ValueError(f"{source} is no source that can be read: expected {ACCEPTED}")


def fingerprint(sources: list, image_root: str | None, out) -> dict | None:
    """Files and bytes of the sources, and a hash of all names, sizes and times; None for emoji."""
    if sources == ["emoji"]:
        return None
    sizes, digest = [], hashlib.sha256()
    for name, about in source_files(sources, image_root, out):
        sizes.append(about.st_size)
        digest.update(os.fsencode(f"{name}\0{about.st_size}\0{about.st_mtime_ns}\0"))
    return {"files": len(sizes), "bytes": sum(sizes), "sha256": digest.hexdigest()}


def source_files(sources: list, image_root: str | None, out):
    """(name in its source, os.stat) of every file that is not in `out`.

    Links are followed, and each folder is entered once: they may go round.
    """
    roots = [Path(source) for source in sources]
    roots += [Path(image_root or root.parent) for root in roots if root.suffix in QUESTIONS]
    seen = {os.path.realpath(out)}
    for root in roots:
        if root.is_file():
            yield root.name, root.stat()
        for folder, folders, names in os.walk(root, followlinks=True):
            real, inside = os.path.realpath(folder), os.path.relpath(folder, root)
            if real in seen:
                folders.clear()                            # no deeper
                continue
            seen.add(real)
            folders.sort()
            for name in sorted(names):
                with contextlib.suppress(OSError):         # a link to nothing
                    yield os.path.join(inside, name), os.stat(os.path.join(folder, name))


def rows_of(rows, folder: Path, check):
    """(where, row) pairs -> entries, by a function that checks a row."""
    for where, row in rows:
        try:
            path, text = check(row, folder, where)
        except (ValueError, FileNotFoundError) as error:
            yield Skipped(where, str(error).removeprefix(f"{where}: "))
        else:
            yield captioned(path.relative_to(folder).as_posix(), path, text)


def image_folder(folder: Path):
    """metadata.jsonl, line by line."""
    with open(folder / METADATA, "rb") as file:            # bytes: U+2028 ends no line of JSON
        lines = ((f"{METADATA}, line {number}", line)
                 for number, line in enumerate(file, start=1) if line.strip())
        yield from rows_of(lines, folder, _parse_line)


def csv_row(row: dict, folder: Path, where: str):
    """check_row, and ValueError for what a table has that no JSON has."""
    if isinstance(row, csv.Error):
        raise ValueError(f"cannot be read ({row})")
    if more := ",".join(row.get(None, ())).rstrip(","):    # commas alone are empty columns
        raise ValueError(f"more columns than the first line names, from {shorten(repr(more))} on: "
                         "a text with commas needs quotes")
    path, text = check_row(row, folder, where)
    if any("\udc80" <= letter <= "\udcff" for letter in text):         # surrogateescape
        raise ValueError(f"not UTF-8: {shorten(ascii(text))}; save the table as UTF-8")
    return path, text


def captions_csv(folder: Path):
    """captions.csv, row by row; ValueError when the columns are not named."""
    path = folder / "captions.csv"
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        table = csv.DictReader(file, strict=True)          # strict: no caption garbled by a quote
        try:
            names = table.fieldnames or []
        except csv.Error as error:
            names = [str(error)]
        if not {"file_name", "text"} <= set(names):
            raise ValueError(f"{path}: the first line must name the columns file_name and text, it "
                             f"has {shorten(str(names))}")
        yield from rows_of(csv_rows(table), folder, csv_row)


def csv_rows(table):
    """(where, row); a row that cannot be read is its csv.Error, and the next line begins anew."""
    while True:
        try:
            row = next(table, None)
        except csv.Error as error:
            row = error
        if row is None:
            return
        yield f"captions.csv, line {table.reader.line_num}", row


def webdataset(tar: Path, codes: bool = False):
    """The samples of a tar, as tar_groups finds them; what is none, or damaged, is Skipped.

    ignore_zeros: behind an end mark another archive may follow, and behind damage the rest.
    """
    try:
        # without compression: whoever decodes a picture reads it by its place
        with tarfile.open(tar, "r:", ignore_zeros=True) as archive:
            for name, parts in tar_groups(archive):
                key = "/".join((tar.name, *filter(None, name)))
                yield tar_sample(tar, archive, key, parts, codes)
    except (tarfile.TarError, OSError) as error:
        yield Skipped(tar.name, f"the rest of it cannot be read ({error}); "
                                "expected a tar without compression")


def tar_groups(archive):
    """(name, {suffix: part}) of every sample: neighbours of one name, each suffix once.

    a.png a.txt a.png a.txt b.png -> a {png, txt}, a {png, txt}, b {png}
    """
    group, parts = None, {}
    for name, suffix, part in tar_parts(archive):
        if name[1] == "":                                  # ._0.png may lie between 0.png and 0.txt
            yield (name[0], f".{suffix}"), {"": "a hidden file belongs to no sample"}
            continue
        if parts and (name != group or suffix in parts):
            yield group, parts
            parts = {}
        group, parts[suffix] = name, part
    if parts:
        yield group, parts


def tar_parts(archive):
    """((folder, name up to the first dot), the rest of the name, member) of all but folders.

    In place of a member without bytes of its own, and of damage, stands a text that says why.
    """
    file, end = archive.fileobj, 0
    for member in archive:
        yield from tar_gap(file, end, member.offset)
        end = archive.offset
        folder, _, name = member.name.rpartition("/")
        stem, _, suffix = name.partition(".")
        if not member.isdir():
            yield (folder, stem), suffix.lower(), not_plain(member) or member
    size = file.seek(0, io.SEEK_END)
    if size - end < tarfile.BLOCKSIZE:
        yield ("", None), "", "there is no end mark: perhaps it is cut short"
    else:
        yield from tar_gap(file, end, size)


def not_plain(member) -> str:
    """Why a member holds no bytes that can be read by their place; "" for a plain file."""
    if member.isreg() and not member.issparse():
        return ""
    kind = "a link" if member.issym() or member.islnk() else "no plain file"
    return f"{Path(member.name).name} is {kind}: store the file itself"


def tar_gap(file, start: int, stop: int):
    """What tar_parts has for the bytes between two members: nothing, when they are zeros.

    Nor when they begin with a header: it is one for all that follow, and tarfile has read it.
    """
    file.seek(start)
    places = range(start, stop, tarfile.BLOCKSIZE)
    blocks = (file.read(tarfile.BLOCKSIZE) for _ in places)
    first = next(filter(any, blocks), None)
    try:
        if first:
            tarfile.TarInfo.frombuf(first, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        why = f"bytes {start} to {stop} are no entry: it is damaged, or compressed"
        yield ("", None), "", why


def tar_sample(tar: Path, archive, key: str, parts: dict, codes: bool):
    """{suffix: part} -> Item or Skipped. The caption is the .txt, else "caption" in the .json."""
    for part in parts.values():
        if isinstance(part, str):
            return Skipped(key, part)
    pictures = [parts[suffix] for suffix in SUFFIXES[codes] if suffix in parts]
    if not pictures:
        return Skipped(key, f"no picture among .{', .'.join(parts)}")
    try:
        text = tar_caption(archive, parts)
    except ValueError as error:
        return Skipped(key, str(error))
    return captioned(key, Slice(tar, pictures[0].offset_data, pictures[0].size), text)


def tar_caption(archive, parts: dict) -> str:
    """ValueError says why there is none."""
    text = ""
    if "txt" in parts:
        try:
            text = archive.extractfile(parts["txt"]).read().decode("utf-8-sig")
        except UnicodeDecodeError:
            raise ValueError("its .txt is not UTF-8") from None
    if not text.strip() and "json" in parts:
        try:
            text = parse_json(archive.extractfile(parts["json"]).read()).get("caption") or ""
        except (ValueError, AttributeError):
            raise ValueError("its .json is no JSON object") from None
    if not isinstance(text, str):
        raise ValueError(f'the "caption" in its .json must be a text, not {shorten(repr(text))}')
    if not text.strip():
        raise ValueError("no caption")
    return text


def conversations(path: Path, root: Path):
    """LLaVA's questions; pictures are looked for in `root`. ValueError when it is no list."""
    if path.suffix == ".jsonl":
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield conversation(line, root, f"{path.name}, line {number}")
        return
    try:
        entries = parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
    if not isinstance(entries, list):
        raise ValueError(f"{path} must hold a list of conversations, it holds a "
                         f"{type(entries).__name__}")
    for number, entry in enumerate(entries):
        yield conversation(entry, root, f"{path.name}, entry {number}")


def conversation(entry, root: Path, where: str):
    """An entry (or its JSON) -> Item or Skipped: one question and its answer a turn."""
    try:
        entry = parse_json(entry) if isinstance(entry, bytes) else entry
        picture, _ = check_row({"file_name": entry.get("image"), "text": "-"}, root, where)
        speakers = [str(turn["from"]) for turn in entry["conversations"]]
        said = [turn["value"].replace("<image>", "").strip() for turn in entry["conversations"]]
    except (ValueError, FileNotFoundError) as error:
        why = str(error).removeprefix(f"{where}: ").replace('"file_name"', '"image"')
        return Skipped(where, why)
    except (LookupError, TypeError, AttributeError):
        return Skipped(where, 'needs "conversations", a list of {"from": .., "value": text}')
    in_turns = {*speakers[::2]} <= {"human", "user"} and {*speakers[1::2]} <= {"gpt", "assistant"}
    if not said or len(said) % 2 or not in_turns:
        return Skipped(where, "turns must go human, gpt, human, gpt: not "
                              f"{shorten(', '.join(speakers))}")
    if not all(said[1::2]):
        return Skipped(where, "an answer is empty")
    texts = [("mmu", *turn) for turn in zip(said[::2], said[1::2])]
    return Item(picture.relative_to(root).as_posix(), picture, texts)


def picture_type(size: int, n_codes: int | None) -> tuple:
    """(dtype, shape) of a picture: pixels, or codes when it is said how many there are."""
    return (np.uint8, (size, size, 3)) if n_codes is None else (np.int32, (size, size))


def decode(job):
    """(item, size, n_codes) -> the bytes of its picture (picture_type), or why there is none."""
    (key, picture, *_), size, n_codes = job
    if not isinstance(picture, (Path, Slice)):
        return picture.tobytes()
    try:
        if isinstance(picture, Slice):
            with open(picture.path, "rb") as file:
                file.seek(picture.offset)
                picture = io.BytesIO(file.read(picture.size))
        if n_codes is None:
            return read_image(picture, size, key).numpy().tobytes()
        return load_codes(picture, (size, size), n_codes).tobytes()
    except (ValueError, OSError) as error:
        return str(error).removeprefix(f"{key}: ")

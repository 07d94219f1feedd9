"""From pictures with captions and questions to token shards.

    python -m unimod_mini.prepare SOURCE [SOURCE ..] OUT

Four stages, each of which leaves complete files in OUT/work, so that the same command goes on where
it was stopped:

    1. pictures   read, fitted on a white square of --size pixels      work/pixels-*.npy
    2. codec      the image tokenizer: trained, or loaded              work/codec.pt
    3. codes      the pictures as codes                                work/codes-*.npy
    4. shards     text budget, train and held-out split (shards.py)    OUT/

Beside the shards: reconstruction.png (originals over what the codes draw), skipped.txt (what was
left out, and why), held.jsonl (the held-out samples in the order of the shards, with what each
tests), NOTICE (credits, for emoji).

For weights that others trained, --text takes their text tokenizer, and with --image codes the
pictures come as .npy files of --size x --size codes of their image tokenizer: stage 2 has nothing
to do then, and nothing is reconstructed.

Departure from the usual: a picture that occurs again, by its pixels, is stored once and keeps the
split of its first occurrence, so that no picture is on both sides. The split is a hash of the key,
so that more data moves nothing.

OUT remembers the names, sizes and times of its sources' files. Where these have changed, --changed
says what to do: `add` reads what stands behind what was read, and leaves that as it is; `anew`
begins again.

Legend: m pictures in a chunk, S pixels a side, h and w rows and columns of image codes.
"""

import argparse
import json
import math
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from random import Random

import numpy as np
import torch
from torch import Tensor

from ..atomic_files import save_data, whole_file, write_json
from ..console import command, flag, progress_bar
from ..device import find_device
from ..image_codecs import Codes, Palette
from ..pictures import pillow, save_png
from ..text_codecs import ByteText, HFText, WordText, shorten
from ..tokenizer import Tokenizer, image_from_state, image_state
from ..vq import VQ, measure, train_vq
from .emoji import CREDITS, Emoji, check_size, fetch_emoji, write_notice
from .readers import ACCEPTED, DESCRIBE, fingerprint, read_source
from .shards import Sample, text_ids, write_shards
from .work_folder import Chunks

QUANTIZERS = {"vq": "nearest", "lfq": "lfq"}
TRAINED = (*QUANTIZERS, "palette")
FIT, JUDGE = 20_000, 1000          # pictures that the codec is trained and judged on, at most
FIT_BYTES = 2**31                  # of them in memory, at most
BUDGET = {"bytes": 256, "other": 128}    # text budget unless given; Show-o was pretrained with 128
CAPTION = "Please describe this image."  # what a published model is asked for a caption
DEFAULTS = {"patch": 4, "codes": 1024, "width": 48, "vq_steps": 2000, "scenes": 20_000}
MADE = ("work/records-*", "work/pixels-*", "work/codes-*", "work/*.pt", "work/pictures.done",
        "tokenizer.pt", "train-*.shard", "held-*.shard", "held.jsonl", "reconstruction.png",
        "skipped.txt", "dataset.json")     # all that is made of sources, in OUT


# --- 1. Pictures ---

def read_pictures(args, chunks: Chunks) -> None:
    """The entries of all sources, one after the other, into chunks."""
    if args.sources == ["emoji"]:
        world = Emoji(fetch_emoji(chunks.folder), args.size, args.scenes, args.held, args.limit,
                      args.seed)
        chunks.read(iter(world), args.size, args.held, workers=1)      # they are pixels already
        return
    codes = args.image == "codes"
    entries = chain.from_iterable(read_source(source, args.image_root, codes)
                                  for source in args.sources)
    entries = islice(entries, args.limit)
    chunks.read(entries, args.size, args.held, args.workers, args.codes if codes else None)


@dataclass
class Summary:
    """What one pass over all records finds."""
    entries: int = 0
    skipped: list = field(default_factory=list)            # (key, why)
    used: int = 0                                          # entries with a picture
    pictures: dict = field(default_factory=lambda: {"train": set(), "held": set()})
    texts: Counter = field(default_factory=Counter)        # (split, task): how many
    held_kinds: Counter = field(default_factory=Counter)
    words: set = field(default_factory=set)
    longest: int = 0                                       # words of a question and its answer

    def add(self, record: dict) -> None:
        self.entries += 1
        if "skipped" in record:
            self.skipped.append((record["key"], record["skipped"]))
            return
        self.used += 1
        split = record["split"]
        self.pictures[split].add(record["picture"])
        if split == "held":
            self.held_kinds[record["kind"]] += 1
        for task, question, answer in record["texts"]:
            self.texts[split, task] += 1
            words = question.split() + answer.split()
            self.words.update(words)
            self.longest = max(self.longest, len(words))


def summary_of(chunks: Chunks) -> Summary:
    """ValueError when there is no picture to train on."""
    found = Summary()
    for record in chunks.records():
        found.add(record)
    if not found.pictures["train"]:
        held = len(found.pictures["held"])
        raise ValueError(nothing_left(f"{found.entries} entries", held, found.skipped))
    return found


def nothing_left(read: str, held: int, skipped: list) -> str:
    """What to say when nothing is left to train on; skipped: (key, why).

    Names the most frequent reason with an example. Reasons with the same words are the same, such
    as "1.png is a link" and "2.png is a link".
    """
    reasons = {}
    for key, why in skipped:
        unquoted = re.sub("\".*?\"|'.*?'", "", why)
        words = tuple(filter(str.isalpha, unquoted.split()))
        reasons.setdefault(words, []).append(f"{why} ({key})")
    most = max(reasons.values(), key=len, default=[])
    example = f", {len(most)} of them for: {most[0]}" if most else ""
    return (f"nothing to train on: {read} were read, {held} held out and {len(skipped)} left out"
            f"{example}")


# --- 2. Codec, 3. codes ---

def some_pictures(chunks: Chunks, numbers, n: int, seed: int) -> tuple[list, Tensor]:
    """At most n pictures with these numbers: their numbers, ascending, and uint8 (n, S, S, 3)."""
    rng = Random(f"pictures {seed}")
    picked = sorted(rng.sample(sorted(numbers), min(n, len(numbers))))
    images = torch.empty(len(picked), *chunks.array("pixels", 0).shape[1:], dtype=torch.uint8)
    for image, number in zip(images, picked):
        image.copy_(chunks.picture("pixels", number))
    return picked, images


def make_codec(args, chunks: Chunks, train: set):
    """The image codec: stored by an earlier call, loaded from --image, or trained on `train`."""
    path, training = chunks.folder / "codec.pt", chunks.folder / "training.pt"
    if not path.exists():
        if args.image == "codes":
            codec = Codes(args.codes)
        elif args.image in TRAINED:
            codec = fit_codec(args, chunks, train, training)
        else:
            codec = load_codec(args.image)
        save_data(path, image_state(codec))
    training.unlink(missing_ok=True)                       # here: a kill behind codec.pt leaves it
    codec = load_codec(path)
    return codec.to(find_device(args.device)) if isinstance(codec, VQ) else codec


def fit_codec(args, chunks: Chunks, train: set, training: Path):
    """A palette, or a VQ of the given sizes, whose training goes on from the file `training`."""
    n = min(FIT, max(1, FIT_BYTES // (3 * args.size**2)))
    _, images = some_pictures(chunks, train, n, args.seed)
    if args.image == "palette":
        print(f"palette: k-means on {len(images)} pictures")
        return Palette.fit(images, args.codes, args.patch, seed=args.seed)
    torch.manual_seed(args.seed)
    vq = VQ(args.codes, args.patch, args.width, quantizer=QUANTIZERS[args.image])
    vq.to(find_device(args.device))
    train_vq(images, vq, args.vq_steps, args.seed, state=training)
    return vq


def load_codec(path):
    """The image codec of codec.pt or of a tokenizer.pt. ValueError names the file if it is none."""
    try:
        return image_from_state(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:                             # torch advises to load it unsafely
        raise ValueError(f"{path} is no image tokenizer: expected vq, lfq, palette, or the "
                         "tokenizer.pt of a data set that was prepared before") from error


def write_codes(chunks: Chunks, codec) -> None:
    """Every chunk of pixels -> a chunk of codes."""
    with progress_bar(desc="codes", unit="picture", total=chunks.starts[-1]) as bar:
        for chunk in range(len(chunks)):
            if not chunks.path("codes", chunk).exists():
                images = torch.from_numpy(np.array(chunks.array("pixels", chunk)))
                side = images.shape[1] // codec.patch
                codes = [torch.zeros(0, side, side)]       # of a chunk without pictures
                codes += [codec.encode(part).cpu() for part in images.split(64) if len(part)]
                dtype = np.uint16 if codec.n_codes <= 2**16 else np.int32
                chunks.save("codes", chunk, torch.cat(codes).numpy().astype(dtype))    # (m, h, w)
            bar.update(chunks.starts[chunk + 1] - chunks.starts[chunk])


def judge_codec(chunks: Chunks, codec, pictures: dict, out: Path, seed: int) -> dict:
    """Prints and returns how well pictures come back, by split, and draws eight of each."""
    results, drawn, sides = {}, [], {}
    for split, numbers in pictures.items():
        if not numbers:
            continue
        numbers, images = some_pictures(chunks, numbers, JUDGE, seed)
        report = measure(images, codec)
        results[split] = {}
        for name, value in report._asdict().items():       # JSON has no infinity
            results[split][name] = round(value, 4) if value < math.inf else None
        print(f"{split:<6}{len(images)} pictures come back with a mean error of "
              f"{report.error:.2f} of 255, psnr {report.psnr:.2f} dB; {report.usage:.1%} of "
              f"{codec.n_codes} codes used, perplexity {report.perplexity:.0f}")
        pick = sorted(Random(f"sheet {seed}").sample(range(len(images)), min(8, len(images))))
        drawn += original_over_drawn(images[pick], codec)
        sides |= {numbers[i]: split for i in pick}
    captions = captions_of(chunks, sides)
    scale = max(1, 128 // images.shape[1])
    print(save_png(torch.stack(drawn), captions, out / "reconstruction.png", scale))
    return results


def original_over_drawn(images: Tensor, codec) -> list:
    """uint8 (n, S, S, 3) -> n pictures (2 S + 1, S, 3), a white line between the two."""
    drawn = codec.decode(codec.encode(images)).cpu()
    gap = drawn.new_full((len(images), 1, *drawn.shape[2:]), 255)
    return list(torch.cat((images, gap, drawn), dim=1))


def captions_of(chunks: Chunks, sides: dict) -> list:
    """{picture: split} -> "split: its first text" of each, in this order."""
    texts = {}
    for record in chunks.used():
        if record["picture"] in sides and record["texts"]:
            texts[record["picture"]] = record["texts"][0][1]
    return [f"{split}: {shorten(texts[number])}" for number, split in sides.items()]


# --- 4. Shards ---

def make_tokenizer(args, found: Summary, codec) -> Tokenizer:
    """Words of the data, bytes or a published tokenizer, with the layouts of --backbone.

    Words get the budget that the longest text needs.
    """
    side, kind = args.size // codec.patch, text_kind(args)
    grid = (side, side)
    if kind == "words":
        text = WordText(["USER:", "ASSISTANT:", f"{side}*{side}", *sorted(found.words)])
        return Tokenizer(args.backbone, text, codec, grid, args.text_length or found.longest + 2,
                         "USER:", "ASSISTANT:")
    if kind == "bytes":
        return Tokenizer(args.backbone, ByteText(), codec, grid,
                         args.text_length or BUDGET["bytes"], "USER: ", " ASSISTANT: ")
    text = HFText.from_pretrained(kind, args.backbone)
    return Tokenizer(args.backbone, text, codec, grid, args.text_length or BUDGET["other"])


def text_kind(args) -> str:
    """words, bytes, or the name of a tokenizer."""
    return args.text or ("words" if args.sources == ["emoji"] else "bytes")


def texts_of(chunks: Chunks, split: str, task: str):
    """(record, question, answer) of a split and task, in the order of the sources."""
    for record in chunks.used():
        if record["split"] == split:
            for of_task, question, answer in record["texts"]:
                if of_task == task:
                    yield record, question, answer


def samples(chunks: Chunks, tokenizer: Tokenizer, split: str, task: str, total: int,
            left_out: list, listing):
    """The samples of a split and task; texts over the budget go to `left_out`, (key, why).

    listing: the file with a line for every held-out sample.
    """
    texts = texts_of(chunks, split, task)
    for record, question, answer in progress_bar(texts, f"{split} {task}", total, unit="sample"):
        if task == "mmu" and isinstance(tokenizer.text, HFText):
            asked = CAPTION if question == DESCRIBE else question
            question, answer = tokenizer.text.chat(asked, answer)
        try:
            ids = text_ids(tokenizer, task, question, answer)
        except ValueError as error:
            left_out.append((record["key"], str(error)))
            continue
        if split == "held":
            row = {"task": task, "kind": record["kind"], "key": record["key"],
                   "question": question, "answer": answer}
            listing.write(json.dumps(row, ensure_ascii=False) + "\n")
        yield Sample(*ids, chunks.picture("codes", record["picture"]).long())


def write_data(chunks: Chunks, found: Summary, tokenizer: Tokenizer, out: Path,
               about: dict) -> dict:
    """The shards, held.jsonl, and skipped.txt, which marks the data set as finished.

    ValueError when no text is left to train on: then there is no dataset.json.
    """
    for name in ("dataset.json", "skipped.txt"):           # of other sources, or of a stopped call
        (out / name).unlink(missing_ok=True)
    left_out = []
    with whole_file(out / "held.jsonl") as listing:
        rows = {"train": {}, "held": {}}
        for (split, task), total in sorted(found.texts.items(), reverse=True):
            rows[split][task] = samples(chunks, tokenizer, split, task, total, left_out, listing)
        counts = write_shards(out, tokenizer, rows, about=about)
    is_empty = not any(counts["train"].values())
    if is_empty:
        (out / "dataset.json").unlink()
    skipped = found.skipped + left_out
    with whole_file(out / "skipped.txt") as file:
        for key, why in skipped:
            file.write(" ".join(f"{key}: {why}".split()) + "\n")
    if is_empty:
        why = nothing_left(f"{found.texts.total()} texts", sum(counts["held"].values()), left_out)
        raise ValueError(f"{why}; {out}/skipped.txt lists all")
    listed = f", listed in {out}/skipped.txt" if skipped else ""
    print(f"{len(skipped)} left out{listed}")
    return counts


# --- The command line ---

def parser() -> argparse.ArgumentParser:
    cli = argparse.ArgumentParser(
        prog="python -m unimod_mini.prepare", description=__doc__.split("\n")[0],
        epilog=f"The same command goes on where it was stopped. A source is {ACCEPTED}.")
    add = cli.add_argument
    add("sources", metavar="SOURCE", nargs="+", help="what to read; several go into one data set")
    add("out", metavar="OUT",
        help="a new or an empty folder, or one that was begun with the same options")
    add("--backbone", choices=("showo", "emu3"), default="emu3", help="whose layouts (emu3)")
    add("--size", type=int, default=32, help="pixels a side, or codes with --image codes (32)")
    add("--image", default="vq",
        help="vq or lfq (trained), palette (k-means), a tokenizer.pt, or codes: the pictures are "
             ".npy files of them (vq)")
    add("--patch", type=int, help="pixels a side that one code stands for (4)")
    add("--codes", type=int, help="how many codes (1024); needed with --image codes")
    add("--width", type=int, help="channels of the VQ (48)")
    add("--vq-steps", type=int, help="training steps of the VQ (2000)")
    add("--text",
        help="words of the data (emoji), bytes (anything else), or a tokenizer of Hugging Face: "
             "microsoft/phi-1_5 for Show-o, BAAI/Emu3-Chat-hf, or a folder")
    add("--text-length", type=int,
        help="text budget; longer texts are left out (words: the longest; bytes: "
             f"{BUDGET['bytes']}; others: {BUDGET['other']})")
    add("--held", type=float, default=0.05, help="share that is held out (0.05)")
    add("--limit", type=int, help="the first so many entries; emoji: so many concepts")
    add("--scenes", type=int, help="emoji: composed scenes (20000)")
    add("--image-root", help="questions: the folder of the pictures (that of the .json)")
    add("--changed", choices=("add", "anew"),
        help="where the sources are not what they were: add reads what was added behind what was "
             "read (that stays as it is), anew deletes what OUT has of them and begins again")
    add("--seed", type=int, default=0, help="of scenes, the codec and its training pictures (0)")
    add("--workers", type=int, default=usable_cores(),
        help="processes that read pictures (all cores)")
    add("--device", help="cuda, mps or cpu for the VQ; found by itself when not given")
    return cli


def usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def check_options(args) -> None:
    """ValueError, FileNotFoundError or ImportError for what cannot work, before anything is done.

    Fills in the defaults of what was not given.
    """
    for name in ("size", "patch", "codes", "width", "vq_steps", "workers", "limit",
                 "text_length"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"{flag(name)} must be at least 1, got {value}")
    stored = None if args.image in (*TRAINED, "codes") else load_codec(args.image)
    if args.image == "codes" and args.codes is None:
        raise ValueError("--image codes: say how many there are, --codes 8192 for Show-o, --codes "
                         "32768 for Emu3")
    if args.codes is not None and args.codes >= 2**31:
        raise ValueError(f"--codes must be below {2**31}, got {args.codes}")
    fill_in(args)
    if not 0 <= args.held < 1 or args.scenes < 0:
        raise ValueError("expected 0 <= --held < 1 and --scenes of 0 or more, got "
                         f"{args.held} and {args.scenes}")
    check_sources(args)
    check_image(args, stored)
    is_name = text_kind(args) not in ("words", "bytes")
    if is_name and not (Path(args.out) / "dataset.json").exists():
        HFText.from_pretrained(args.text, args.backbone).state()       # raises its own errors
    find_device(args.device)


def fill_in(args) -> None:
    """The defaults of what was not given. ValueError for an option that this job does not read."""
    questions = any(Path(source).suffix in (".json", ".jsonl") for source in args.sources)
    trains_vq = args.image in QUANTIZERS
    for name, is_read, why in (
            ("patch", args.image in TRAINED, f"{args.image} has its own"),
            ("codes", args.image in (*TRAINED, "codes"), f"{args.image} has its own"),
            ("width", trains_vq, f"--image {args.image} trains no VQ"),
            ("vq_steps", trains_vq, f"--image {args.image} trains no VQ"),
            ("scenes", args.sources == ["emoji"], "only emoji has scenes"),
            ("changed", args.sources != ["emoji"], "emoji is always the same"),
            ("image_root", questions, "no source is a .json or .jsonl of questions")):
        if getattr(args, name) is not None and not is_read:
            raise ValueError(f"{flag(name)} has no effect: {why}")
        if getattr(args, name) is None:
            setattr(args, name, DEFAULTS.get(name))


def check_sources(args) -> None:
    if args.sources == ["emoji"]:
        if args.image == "codes":
            raise ValueError("--image codes: emoji are pixels, choose vq, lfq or palette")
        check_size(args.size)
        return
    if "emoji" in args.sources:
        raise ValueError("emoji is a data set of its own: name no other source beside it (a "
                         "folder: ./emoji)")
    for source in args.sources:
        read_source(source, args.image_root)               # raises its own errors


def check_image(args, stored) -> None:
    """stored: the codec of the file --image, or None."""
    if isinstance(stored, Codes):
        raise ValueError(f"--image {args.image}: its pictures are codes, give --image codes "
                         f"--codes {stored.n_codes}")
    if stored:
        args.patch = stored.patch
    if args.image in QUANTIZERS:                           # raises its own errors
        VQ(args.codes, args.patch, width=1, quantizer=QUANTIZERS[args.image])
    if args.image == "codes":
        return
    if args.size % args.patch:
        raise ValueError(f"--size {args.size} does not divide into patches of {args.patch} pixels")
    pillow()


# --- Beginning, going on, beginning again ---
def options_of(args) -> dict:
    """The options that decide what is made, with full paths: photos is ./photos."""
    def resolved(name: str, *words) -> str:
        return name if name in words else str(Path(name).resolve())

    options = dict(vars(args))
    for name in ("out", "workers", "device", "changed"):
        del options[name]
    options["image"] = resolved(args.image, *TRAINED, "codes")
    options["image_root"] = args.image_root and resolved(args.image_root)
    options["sources"] = [resolved(source, "emoji") for source in args.sources]
    if args.text and args.text not in ("words", "bytes") and Path(args.text).is_dir():
        options["text"] = resolved(args.text)
    return options


def begin_or_resume(args, out: Path) -> dict:
    """Makes OUT, or takes it up again; returns its options and the fingerprint of its sources.

    FileExistsError when it holds something else, ValueError when it was begun with other options
    or other sources.
    """
    sources = fingerprint(args.sources, args.image_root, out)
    origin = {"options": options_of(args), "sources": sources}
    settings = out / "work" / "options.json"
    noted = [path for path in (settings, out / "dataset.json") if path.exists()]
    if noted:
        before = json.loads(noted[0].read_text(encoding="utf-8"))
        refuse_other_options(out, before.get("options", {}), origin["options"])
        if before.get("sources") != sources:
            renew(out, args.changed, before.get("sources"), origin)
        return origin
    others = [path for path in out.rglob("*")
              if path.is_file() and path.name != "options.json.tmp"]
    if others or out.is_file():
        raise FileExistsError(f"{out} holds other things: choose a new or an empty folder")
    write_json(settings, origin)
    return origin


def refuse_other_options(out: Path, before: dict, now: dict) -> None:
    for name, value in now.items():
        if before.get(name) != value:
            raise ValueError(f"{out} was begun with {flag(name)} {before.get(name)}, not {value}: "
                             "give the same options, or another folder")


def renew(out: Path, changed: str | None, before: dict | None, origin: dict) -> None:
    """What --changed says to do when the sources are others than before; ValueError if nothing."""
    settings = out / "work" / "options.json"
    if changed == "add" and settings.exists():             # else: work was deleted
        (out / "work" / "pictures.done").unlink(missing_ok=True)
    elif changed == "anew":
        for path in chain.from_iterable(map(out.glob, MADE)):
            path.unlink()
        write_json(settings, origin)
    else:
        size = "{files} files and {bytes} bytes"
        then = size.format(**before or {"files": "unknown", "bytes": "unknown"})
        add = "nothing can be added, for work/ was deleted"
        if settings.exists():
            add = "--changed add reads what was added"
        raise ValueError(f"the sources are not what they were when {out} was begun ({then} then, "
                         f"{size.format(**origin['sources'])} now; names and times count, too): "
                         f"{add}, --changed anew begins again")


def finished_counts(out: Path, sources: dict | None) -> dict | None:
    """The counts of the data set, when it is finished and of these sources."""
    if not ((out / "dataset.json").exists() and (out / "skipped.txt").exists()):
        return None
    about = json.loads((out / "dataset.json").read_text(encoding="utf-8"))
    return about["counts"] if about.get("sources") == sources else None


# --- All stages ---

def prepare(args) -> dict:
    """Returns the counts, {split: {task: n}}."""
    check_options(args)
    out = Path(args.out)
    origin = begin_or_resume(args, out)
    if counts := finished_counts(out, origin["sources"]):
        print(f"{out} is finished")
        return counts
    chunks = Chunks(out / "work")
    if not (chunks.folder / "pictures.done").exists():
        read_pictures(args, chunks)
        write_json(chunks.folder / "options.json", origin)             # it has what was added now
        (chunks.folder / "pictures.done").touch()
    found = summary_of(chunks)
    print(f"{chunks.starts[-1]} different pictures, {len(found.pictures['held'])} of them held "
          "out")
    codec = make_codec(args, chunks, found.pictures["train"])
    write_codes(chunks, codec)
    quality = {}
    if args.image != "codes":
        quality = judge_codec(chunks, codec, found.pictures, out, args.seed)
    tokenizer = make_tokenizer(args, found, codec)
    about = origin | {
        "pictures": {split: len(numbers) for split, numbers in found.pictures.items()},
        "reconstruction": quality, "skipped_pictures": len(found.skipped),
        "repeated_pictures": found.used - chunks.starts[-1], "held_by_kind": found.held_kinds}
    if args.sources == ["emoji"]:
        write_notice(out, "The art is real; the layout of the scenes is synthetic.\n")
        about["credits"] = list(CREDITS.values())
    counts = write_data(chunks, found, tokenizer, out, about)
    report(chunks, counts, tokenizer, out)
    return counts


def report(chunks: Chunks, counts: dict, tokenizer: Tokenizer, out: Path) -> None:
    size = sum(path.stat().st_size for path in chunks.folder.iterdir())
    of_tasks = [f"{n} {split} {task}" for split in counts for task, n in counts[split].items()]
    print(f"{out}: {', '.join(of_tasks)}; vocabulary {tokenizer.vocab_size}, text budget "
          f"{tokenizer.text_length}\n"
          f"{chunks.folder} holds the pictures, {size / 1e6:.0f} MB, and can be deleted\n"
          f"next: python train_full.py --data {out}")


def main(argv=None) -> None:
    with command(stopped="stopped: the same command goes on from here"):
        prepare(parser().parse_args(argv))


if __name__ == "__main__":
    main()

"""From pictures with captions and questions to token shards: python -m unimod_mini.prepare SOURCE [SOURCE ..] OUT

Four stages, each of which leaves complete files in OUT/work, so that the same command goes on where it was stopped:

    1. pictures   read, fitted on a white square of --size pixels, told apart by their pixels   work/pixels-*.npy
    2. codec      the image tokenizer: trained on training pictures, or loaded                  work/codec.pt
    3. codes      the pictures as codes                                                         work/codes-*.npy
    4. shards     text budget, train and held-out split, what shards.py describes               OUT/

Beside the shards: reconstruction.png (originals over what the codes draw), skipped.txt (what was left out, and why),
held.jsonl (the held-out samples in the order of the shards, with what each tests), NOTICE (credits, for emoji).

For weights that others trained, --text takes their text tokenizer, and with --image codes the pictures come as .npy
files of --size x --size codes of their image tokenizer: stage 2 has nothing to do then, and nothing is reconstructed.

Departure from the usual: a picture that occurs again, by its pixels, is stored once and keeps the split of its first
occurrence, so that no picture is on both sides. The split is a hash of the key, so that more data moves nothing.

OUT remembers the names, sizes and times of its sources' files. Where they are others now, --changed
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
from ..text_codecs import ByteText, HFText, WordText, cut
from ..tokenizer import Tokenizer
from ..vq import VQ, measure, train_vq
from .emoji import CREDITS, Emoji, check_size, fetch_emoji, write_notice
from .readers import ACCEPTED, DESCRIBE, fingerprint, read_source
from .shards import Sample, read_tokenizer, text_ids, write_shards
from .work_folder import Chunks

QUANTIZERS = {"vq": "nearest", "lfq": "lfq"}
TRAINED = (*QUANTIZERS, "palette")
FIT, JUDGE = 20_000, 1000          # pictures that the codec is trained and judged on, at most
FIT_BYTES = 2**31                  # of them in memory, at most
BUDGET = {"bytes": 256, "other": 128}    # text budget unless given; Show-o was pretrained with 128
CAPTION = "Please describe this image."  # what a published model is asked where the words of a caption are the answer
DEFAULTS = {"patch": 4, "codes": 1024, "width": 48, "vq_steps": 2000, "scenes": 20_000}      # of what not all jobs read
MADE = ("work/records-*", "work/pixels-*", "work/codes-*", "work/*.pt", "work/pictures.done",
        "tokenizer.pt", "train-*.shard", "held-*.shard", "held.jsonl", "reconstruction.png",
        "skipped.txt", "dataset.json")     # all that is made of sources, in OUT


# --------------------------------------------------------------------------------------------------------------
# 1. Pictures
# --------------------------------------------------------------------------------------------------------------

def read_pictures(args, chunks: Chunks) -> None:
    """The entries of all sources, one after the other, into chunks."""
    if args.sources == ["emoji"]:
        world = Emoji(fetch_emoji(chunks.folder), args.size, args.scenes, args.held, args.limit, args.seed)
        chunks.read(iter(world), args.size, args.held, workers=1)            # they are pixels already
    else:
        codes = args.image == "codes"
        entries = chain.from_iterable(read_source(source, args.image_root, codes) for source in args.sources)
        chunks.read(islice(entries, args.limit), args.size, args.held, args.workers, args.codes if codes else None)


def by_split(chunks: Chunks) -> dict:
    """{split: the numbers of its pictures}. ValueError when there is none to train on."""
    numbers = {"train": set(), "held": set()}
    for record in chunks.used():
        numbers[record["split"]].add(record["picture"])
    numbers = {split: sorted(those) for split, those in numbers.items()}
    if not numbers["train"]:
        read = f"{sum(1 for _ in chunks.records())} entries"
        raise ValueError(nothing(read, len(numbers["held"]), chunks.skipped()))
    return numbers


def nothing(read: str, held: int, skipped: list) -> str:
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


# --------------------------------------------------------------------------------------------------------------
# 2. Codec, 3. codes
# --------------------------------------------------------------------------------------------------------------

def some_pictures(chunks: Chunks, numbers: list, n: int, seed: int) -> tuple[list, Tensor]:
    """At most n of the pictures with these numbers: their numbers, ascending, and uint8 (n, S, S, 3)."""
    numbers = sorted(Random(f"pictures {seed}").sample(numbers, min(n, len(numbers))))
    images = torch.empty(len(numbers), *chunks.array("pixels", 0).shape[1:], dtype=torch.uint8)
    for image, number in zip(images, numbers):
        image.copy_(chunks.picture("pixels", number))
    return numbers, images


def make_codec(args, chunks: Chunks, train: list):
    """The image tokenizer: stored by an earlier call, loaded from --image, or trained on pictures of `train`."""
    path, training = chunks.folder / "codec.pt", chunks.folder / "training.pt"
    if not path.exists():
        codec = (Codes(args.codes) if args.image == "codes" else load_codec(args.image) if args.image not in TRAINED
                 else fit_codec(args, chunks, train, training))
        save_data(path, Tokenizer("showo", ByteText(), codec, (1, 1), 3).state())
    training.unlink(missing_ok=True)                       # here: a kill behind codec.pt leaves it
    codec = load_codec(path)
    return codec.to(find_device(args.device)) if isinstance(codec, VQ) else codec


def fit_codec(args, chunks: Chunks, train: list, training: Path):
    """A palette, or a VQ of the sizes that the command line names, whose training goes on from `training`."""
    _, images = some_pictures(chunks, train, min(FIT, max(1, FIT_BYTES // (3 * args.size**2))), args.seed)
    if args.image == "palette":
        print(f"palette: k-means on {len(images)} pictures")
        return Palette.fit(images, args.codes, args.patch, seed=args.seed)
    torch.manual_seed(args.seed)
    vq = VQ(args.codes, args.patch, args.width, quantizer=QUANTIZERS[args.image]).to(find_device(args.device))
    train_vq(images, vq, args.vq_steps, args.seed, state=training)                  # judge_codec reports on it
    return vq


def load_codec(path):
    """The image codec of a tokenizer's state. ValueError names the file when it is none."""
    try:
        return read_tokenizer(Path(path)).image
    except ValueError as error:
        raise ValueError(f"{path} is no image tokenizer: expected vq, lfq, palette, or the tokenizer.pt of a data set "
                         "that was prepared before") from error


def write_codes(chunks: Chunks, codec) -> None:
    """Every chunk of pixels -> a chunk of codes."""
    with progress_bar(desc="codes", unit="picture", total=chunks.starts[-1]) as bar:
        for chunk in range(len(chunks)):
            if not chunks.path("codes", chunk).exists():
                images = torch.from_numpy(np.array(chunks.array("pixels", chunk)))
                side = images.shape[1] // codec.patch
                codes = [codec.encode(part).cpu() for part in images.split(64) if len(part)]
                codes = torch.cat(codes or [torch.zeros(0, side, side)])                     # (m, h, w)
                chunks.save("codes", chunk, codes.numpy().astype(np.uint16 if codec.n_codes <= 2**16 else np.int32))
            bar.update(chunks.starts[chunk + 1] - chunks.starts[chunk])


def judge_codec(chunks: Chunks, codec, numbers: dict, out: Path, seed: int) -> dict:
    """Prints and returns how well pictures come back, by split, and draws eight of each."""
    results, pictures, sides = {}, [], {}
    for split, those in numbers.items():
        if those:
            those, images = some_pictures(chunks, those, JUDGE, seed)
            report = measure(images, codec)
            rounded = {name: round(x, 4) if x < math.inf else None for name, x in report._asdict().items()}
            results[split] = rounded                                         # JSON has no infinity
            print(f"{split:<6}{len(images)} pictures come back with a mean error of {report.error:.2f} of 255, psnr "
                  f"{report.psnr:.2f} dB; {report.usage:.1%} of {codec.n_codes} codes used, perplexity "
                  f"{report.perplexity:.0f}")
            pick = sorted(Random(f"sheet {seed}").sample(range(len(those)), min(8, len(those))))
            drawn = codec.decode(codec.encode(images[pick])).cpu()
            gap = drawn.new_full((len(pick), 1, *drawn.shape[2:]), 255)
            pictures += torch.cat((images[pick], gap, drawn), dim=1)         # (2 S + 1, S, 3): the original on top
            sides |= {those[i]: split for i in pick}
    texts = {record["picture"]: record["texts"][0][1] for record in chunks.used()
             if record["picture"] in sides and record["texts"]}
    names = [f"{split}: {cut(texts[number])}" for number, split in sides.items()]
    print(save_png(torch.stack(pictures), names, out / "reconstruction.png", max(1, 128 // images.shape[1])))
    return results


# --------------------------------------------------------------------------------------------------------------
# 4. Shards
# --------------------------------------------------------------------------------------------------------------

def make_tokenizer(args, chunks: Chunks, codec) -> Tokenizer:
    """Words of the data, bytes or a published tokenizer, with the layouts of --backbone; words get the budget that the
    longest text needs."""
    grid, kind = (args.size // codec.patch, args.size // codec.patch), text_kind(args)
    if kind == "bytes":
        budget = args.text_length or BUDGET["bytes"]
        return Tokenizer(args.backbone, ByteText(), codec, grid, budget, "USER: ", " ASSISTANT: ")
    if kind != "words":
        text = HFText.from_pretrained(kind, args.backbone)
        return Tokenizer(args.backbone, text, codec, grid, args.text_length or BUDGET["other"])
    words, longest = set(), 0
    for _, question, answer in (text for record in chunks.used() for text in record["texts"]):
        both = question.split() + answer.split()
        words.update(both)
        longest = max(longest, len(both))
    text = WordText(["USER:", "ASSISTANT:", "{}*{}".format(*grid), *sorted(words)])
    return Tokenizer(args.backbone, text, codec, grid, args.text_length or longest + 2, "USER:", "ASSISTANT:")


def text_kind(args) -> str:
    """words, bytes, or the name of a tokenizer."""
    return args.text or ("words" if args.sources == ["emoji"] else "bytes")


def samples(chunks: Chunks, tokenizer: Tokenizer, split: str, task: str, total: int, skipped: list, listing):
    """The samples of a split and task in the order of the sources; those over the text budget go to `skipped`."""
    texts = ((record, text[1], text[2]) for record in chunks.used() if record["split"] == split
             for text in record["texts"] if text[0] == task)
    for record, question, answer in progress_bar(texts, f"{split} {task}", total, unit="sample"):
        if task == "mmu" and isinstance(tokenizer.text, HFText):
            question, answer = tokenizer.text.chat(CAPTION if question == DESCRIBE else question, answer)
        try:
            ids = text_ids(tokenizer, task, question, answer)
        except ValueError as error:
            skipped.append((record["key"], str(error)))
            continue
        if split == "held":
            row = {"task": task, "kind": record["kind"], "key": record["key"], "question": question, "answer": answer}
            listing.write(json.dumps(row, ensure_ascii=False) + "\n")
        yield Sample(*ids, chunks.picture("codes", record["picture"]).long())          # their ids: checked once


def write_data(chunks: Chunks, tokenizer: Tokenizer, out: Path, about: dict) -> dict:
    """The shards, and beside them held.jsonl and skipped.txt, which marks the data set as finished.

    ValueError when no text is left to train on: then there is no dataset.json.
    """
    totals = Counter((record["split"], task) for record in chunks.used() for task, *_ in record["texts"])
    skipped = chunks.skipped()
    n_pictures = len(skipped)
    about |= {"skipped_pictures": n_pictures, "repeated_pictures": sum(1 for _ in chunks.used()) - chunks.starts[-1],
              "held_by_kind": Counter(record["kind"] for record in chunks.used() if record["split"] == "held")}
    for name in ("dataset.json", "skipped.txt"):           # of other sources, or of a stopped call
        (out / name).unlink(missing_ok=True)
    with whole_file(out / "held.jsonl") as listing:
        rows = {split: {task: samples(chunks, tokenizer, split, task, totals[split, task], skipped, listing)
                        for task in ("t2i", "mmu") if totals[split, task]} for split in ("train", "held")}
        counts = write_shards(out, tokenizer, rows, about=about)
    is_empty = not any(counts["train"].values())
    if is_empty:
        (out / "dataset.json").unlink()
    with whole_file(out / "skipped.txt") as file:
        file.writelines(" ".join(f"{key}: {why}".split()) + "\n" for key, why in skipped)
    if is_empty:
        why = nothing(f"{totals.total()} texts", sum(counts["held"].values()), skipped[n_pictures:])
        raise ValueError(f"{why}; {out}/skipped.txt lists all")
    print(f"{len(skipped)} left out{f', listed in {out}/skipped.txt' if skipped else ''}")
    return counts


# --------------------------------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------------------------------

def parser() -> argparse.ArgumentParser:
    cli = argparse.ArgumentParser(prog="python -m unimod_mini.prepare", description=__doc__.split(":")[0] + ".",
                                  epilog="The same command goes on where it was stopped. A source is " + ACCEPTED + ".")
    cli.add_argument("sources", metavar="SOURCE", nargs="+", help="what to read; several go into one data set")
    cli.add_argument("out", metavar="OUT", help="a new or an empty folder, or one that was begun with the same options")
    cli.add_argument("--backbone", choices=("showo", "emu3"), default="emu3", help="whose layouts (emu3)")
    cli.add_argument("--size", type=int, default=32, help="pixels a side, or codes with --image codes (32)")
    cli.add_argument("--image", default="vq", help="vq or lfq (trained), palette (k-means), a tokenizer.pt, or codes: "
                                                   "the pictures are .npy files of them (vq)")
    cli.add_argument("--patch", type=int, help="pixels a side that one code stands for (4)")
    cli.add_argument("--codes", type=int, help="how many codes (1024); needed with --image codes")
    cli.add_argument("--width", type=int, help="channels of the VQ (48)")
    cli.add_argument("--vq-steps", type=int, help="training steps of the VQ (2000)")
    cli.add_argument("--text", help="words of the data (emoji), bytes (anything else), or a tokenizer of Hugging Face: "
                                    "microsoft/phi-1_5 for Show-o, BAAI/Emu3-Chat-hf, or a folder")
    cli.add_argument("--text-length", type=int, help="text budget; longer texts are left out (words: the longest; "
                                                     f"bytes: {BUDGET['bytes']}; others: {BUDGET['other']})")
    cli.add_argument("--held", type=float, default=0.05, help="share that is held out (0.05)")
    cli.add_argument("--limit", type=int, help="the first so many entries; emoji: so many concepts")
    cli.add_argument("--scenes", type=int, help="emoji: composed scenes (20000)")
    cli.add_argument("--image-root", help="questions: the folder of the pictures (that of the .json)")
    cli.add_argument("--changed", choices=("add", "anew"),
                     help="where the sources are not what they were: add reads what was added behind what "
                          "was read (that stays as it is), anew deletes what OUT has of them and begins again")
    cli.add_argument("--seed", type=int, default=0, help="of the scenes, the codec and its training pictures (0)")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cli.add_argument("--workers", type=int, default=cores, help="processes that read pictures (all cores)")
    cli.add_argument("--device", help="cuda, mps or cpu for the VQ; found by itself when not given")
    return cli


def fill_in(args) -> None:
    """Sets the defaults of the options that were not given. ValueError for one that was given and is not read."""
    questions = any(Path(source).suffix in (".json", ".jsonl") for source in args.sources)
    for name, is_read, why in (
            ("patch", args.image in TRAINED, f"{args.image} has its own"),
            ("codes", args.image in (*TRAINED, "codes"), f"{args.image} has its own"),
            ("width", args.image in QUANTIZERS, f"--image {args.image} trains no VQ"),
            ("vq_steps", args.image in QUANTIZERS, f"--image {args.image} trains no VQ"),
            ("scenes", args.sources == ["emoji"], "only emoji has scenes"),
            ("changed", args.sources != ["emoji"], "emoji is always the same"),
            ("image_root", questions, "no source is a .json or .jsonl of questions")):
        if getattr(args, name) is not None and not is_read:
            raise ValueError(f"{flag(name)} has no effect: {why}")
        if getattr(args, name) is None:
            setattr(args, name, DEFAULTS.get(name))


def check(args) -> None:
    """ValueError, FileNotFoundError or ImportError for what would fail later; fills in what was not given."""
    for name in ("size", "patch", "codes", "width", "vq_steps", "workers", "limit", "text_length"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"{flag(name)} must be at least 1, got {getattr(args, name)}")
    stored = None if args.image in (*TRAINED, "codes") else load_codec(args.image)
    if args.image == "codes" and args.codes is None:
        raise ValueError("--image codes: say how many there are, --codes 8192 for Show-o, --codes 32768 for Emu3")
    if args.codes is not None and args.codes >= 2**31:
        raise ValueError(f"--codes must be below {2**31}, got {args.codes}")
    fill_in(args)
    if not 0 <= args.held < 1 or args.scenes < 0:
        raise ValueError(f"expected 0 <= --held < 1 and --scenes of 0 or more, got {args.held} and {args.scenes}")
    if args.sources == ["emoji"]:
        if args.image == "codes":
            raise ValueError("--image codes: emoji are pixels, choose vq, lfq or palette")
        check_size(args.size)
    elif "emoji" in args.sources:
        raise ValueError("emoji is a data set of its own: name no other source beside it (a folder: ./emoji)")
    else:
        for source in args.sources:
            read_source(source, args.image_root)
    if isinstance(stored, Codes):
        raise ValueError(f"--image {args.image}: its pictures are codes, give --image codes --codes {stored.n_codes}")
    if text_kind(args) not in ("words", "bytes") and not (Path(args.out) / "dataset.json").exists():
        HFText.from_pretrained(args.text, args.backbone).state()             # raises what would fail later
    if args.image in QUANTIZERS:
        VQ(args.codes, args.patch, width=1, quantizer=QUANTIZERS[args.image])                # raises its own errors
    elif stored:
        args.patch = stored.patch
    if args.image != "codes" and args.size % args.patch:
        raise ValueError(f"--size {args.size} does not divide into patches of {args.patch} pixels")
    find_device(args.device)
    if args.image != "codes":
        pillow()


def options_of(args) -> dict:
    """The options that decide what is made, with full paths: photos is ./photos."""
    without = ("out", "workers", "device", "changed")
    options = {name: value for name, value in vars(args).items() if name not in without}
    resolved = lambda name, *words: name if name in words else str(Path(name).resolve())
    options |= {"image": resolved(args.image, *TRAINED, "codes"), "image_root": args.image_root and resolved(
        args.image_root), "sources": [resolved(source, "emoji") for source in args.sources]}
    if args.text and args.text not in ("words", "bytes") and Path(args.text).is_dir():
        options["text"] = resolved(args.text)
    return options


def begin(args, out: Path) -> dict:
    """Makes OUT, or takes it up again; returns its options and the fingerprint of its sources.

    FileExistsError when it holds something else, ValueError when it was begun with other options or
    other sources.
    """
    sources = fingerprint(args.sources, args.image_root, out)
    origin = {"options": options_of(args), "sources": sources}
    settings = out / "work" / "options.json"
    noted = next((path for path in (settings, out / "dataset.json") if path.exists()), None)
    if noted:
        before = json.loads(noted.read_text(encoding="utf-8"))
        check_options(out, before.get("options", {}), origin["options"])
        if before.get("sources") != sources:
            renew(out, args.changed, before.get("sources"), origin)
        return origin
    if out.is_file() or any(path.is_file() and path.name != "options.json.tmp" for path in out.rglob("*")):
        raise FileExistsError(f"{out} holds other things: choose a new or an empty folder")
    write_json(settings, origin)
    return origin


def check_options(out: Path, before: dict, now: dict) -> None:
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
        unknown = {"files": "unknown", "bytes": "unknown"}
        then, now = ("{files} files and {bytes} bytes".format(**of)
                     for of in (before or unknown, origin["sources"]))
        add = "--changed add reads what was added" if settings.exists() else (
            "nothing can be added, for work/ was deleted")
        raise ValueError(f"the sources are not what they were when {out} was begun ({then} then, "
                         f"{now} now; names and times count, too): {add}, --changed anew begins again")


def finished(out: Path, sources: dict | None) -> dict | None:
    """The counts of the data set, when it is finished and of these sources."""
    if (out / "dataset.json").exists() and (out / "skipped.txt").exists():
        about = json.loads((out / "dataset.json").read_text(encoding="utf-8"))
        return about["counts"] if about.get("sources") == sources else None


def prepare(args) -> dict:
    """All stages; returns the counts, {split: {task: n}}."""
    check(args)
    out = Path(args.out)
    origin = begin(args, out)
    if counts := finished(out, origin["sources"]):
        print(f"{out} is finished")
        return counts
    chunks = Chunks(out / "work")
    if not (chunks.folder / "pictures.done").exists():
        read_pictures(args, chunks)
        write_json(chunks.folder / "options.json", origin)                   # now it has what was added
        (chunks.folder / "pictures.done").touch()
    numbers = by_split(chunks)
    print(f"{chunks.starts[-1]} different pictures, {len(numbers['held'])} of them held out")
    codec = make_codec(args, chunks, numbers["train"])
    write_codes(chunks, codec)
    quality = {} if args.image == "codes" else judge_codec(chunks, codec, numbers, out, args.seed)
    tokenizer = make_tokenizer(args, chunks, codec)
    pictures = {split: len(those) for split, those in numbers.items()}
    about = origin | {"pictures": pictures, "reconstruction": quality}
    if args.sources == ["emoji"]:
        write_notice(out, "The art is real; the layout of the scenes is synthetic.\n")
        about["credits"] = list(CREDITS.values())
    counts = write_data(chunks, tokenizer, out, about)
    size = sum(path.stat().st_size for path in chunks.folder.iterdir())
    print(f"{out}: " + ", ".join(f"{n} {split} {task}" for split in counts for task, n in counts[split].items())
          + f"; vocabulary {tokenizer.vocab_size}, text budget {tokenizer.text_length}\n"
          f"{chunks.folder} holds the pictures, {size / 1e6:.0f} MB, and can be deleted\n"
          f"next: python train_full.py --data {out}")
    return counts


def main(argv=None) -> None:
    with command(stopped="stopped: the same command goes on from here"):
        prepare(parser().parse_args(argv))


if __name__ == "__main__":
    main()

"""A world of real art: emoji in two styles, alone and in composed scenes, with captions, questions
and splits.

The pictures are Noto Emoji and Twemoji, as the npm packages emoji-datasource-google and -twitter
bring them (64 px); names, groups and skin tones come from the packages' emoji.json. The art is
real, the layout of the scenes is synthetic.

    alone                 "a google emoji of woman surfing with dark skin"
    scene of one kind     "a twitter scene of three fox"
    scene of a pair       "a google scene of fox left of red apple"

Held out are recombinations of what training shows in other company, each by the hash of what is recombined:
    style x concept       Twitter's rendering of a concept; Google's is trained on. Its sprite is in no training scene
    skin tone x concept   a tone of a person or hand, in both styles; its other tones are trained on
    pair                  two things in one scene, in either order and relation
    count                 a thing, that many times

Departure from other recombination sets: no name is held out altogether. There is one drawing of a
concept and style, so that an unseen name could not be learnt.

`python -m unimod_mini.data.emoji FOLDER` leaves the pictures of some concepts as files, for
`train_toy.py --images FOLDER`.
"""

import argparse
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
import unicodedata
from pathlib import Path
from random import Random
from typing import NamedTuple

from ..atomic_files import whole_file
from ..console import command, progress_bar
from ..pictures import read_image
from .image_folder import METADATA, read_metadata
from .readers import Item, hashed_share

STYLES, VERSION = ("google", "twitter"), "16.0.0"  # VERSION of the npm packages: the same for both
CREDITS = {"google": "Noto Emoji, Google LLC, Apache-2.0, https://apache.org/licenses/LICENSE-2.0",
           "twitter": "Twemoji (Twitter), CC-BY 4.0, https://creativecommons.org/licenses/by/4.0",
           "names": "emoji-datasource (emoji.json), (c) 2013 Cal Henderson, MIT"}
TONES = {"1F3FB": "light", "1F3FC": "medium light", "1F3FD": "medium", "1F3FE": "medium dark", "1F3FF": "dark"}
GROUPS = {"Smileys & Emotion": "face", "People & Body": "person", "Animals & Nature": "nature", "Food & Drink": "food",
          "Travel & Places": "place", "Activities": "activity", "Objects": "object", "Symbols": "symbol",
          "Flags": "flag"}
THINGS = ("nature", "food", "place", "activity", "object")    # what scenes are made of
NUMBERS = ("one", "two", "three", "four")
LONGEST_NAME = 6                   # words; longer names are left out


class Concept(NamedTuple):
    name: str
    group: str
    images: dict                   # {tone, "" for none: file name}


def plain(name: str) -> str:
    """Lower-case words without accents and signs: "T-REX" -> "t rex", "Côte d’Ivoire" -> "cote
    divoire".
    """
    ascii_ = unicodedata.normalize("NFKD", name.lower().replace("&", " and ")).encode("ascii", "ignore").decode()
    return " ".join(re.findall("[a-z0-9]+", ascii_.replace("'", "")))


def read_archives(archives: dict) -> tuple[list, dict]:
    """{style: .tgz} -> the entries of emoji.json and {style: {file name: bytes}}."""
    files, entries = {}, None
    for style, tgz in archives.items():
        with tarfile.open(tgz) as archive:
            for part in archive:
                if part.name == "package/emoji.json":
                    entries = json.load(archive.extractfile(part))
                elif part.name.startswith(f"package/img/{style}/64/"):
                    files.setdefault(style, {})[part.name.rpartition("/")[2]] = archive.extractfile(part).read()
    return entries, files


def choose_concepts(entries: list, files: dict, limit: int | None = None) -> list:
    """The entries that every style draws, the first of each name; `limit` of them, chosen by a
    hash of the name.
    """
    concepts = {}
    there = lambda image: all(image in files[style] for style in files)
    for entry in sorted(entries, key=lambda entry: (entry["category"], entry["sort_order"])):
        name, group = plain(entry["name"]), GROUPS.get(entry["category"])
        tones = {TONES[code]: variant["image"] for code, variant in entry.get("skin_variations", {}).items()
                 if code in TONES and there(variant["image"])}               # two people with a tone each: left out
        if group and name and len(name.split()) <= LONGEST_NAME and there(entry["image"]):
            concepts.setdefault(name, Concept(name, group, {"": entry["image"], **tones}))
    chosen = list(concepts.values())
    return sorted(chosen, key=lambda c: hashed_share("order", c.name))[:limit] if limit else chosen


def decode_singles(concepts: list, files: dict, size: int) -> dict:
    """{(name, tone): {style: uint8 (size, size, 3)}}, without those whose pixels another one has
    in some style.
    """
    seen, pictures = set(), {}
    for concept in progress_bar(concepts, "emoji", unit="concept", disable=len(concepts) < 300):
        for tone, image in concept.images.items():
            drawn = {style: read_image(io.BytesIO(files[style][image]), size, image).numpy() for style in files}
            pixels = {picture.tobytes() for picture in drawn.values()}
            if not pixels & seen:
                pictures[concept.name, tone] = drawn
            seen |= pixels
    return pictures


def check_size(size: int) -> None:
    if size % 4:
        raise ValueError(f"scenes are made of halves and quarters: --size of emoji must be a multiple of 4, got {size}")


class Emoji:
    """The data set as a stream of Item (readers.py): first all pictures alone, then `scenes` scenes
    from a seed.

    archives: {style: .tgz}; size: pixels a side, a multiple of 4; held: share of the recombinations
    that is held out; limit: how many concepts (None: all). Raises ValueError for another size and
    for archives without emoji.
    """

    def __init__(self, archives: dict, size: int = 32, scenes: int = 20_000, held: float = 0.05,
                 limit: int | None = None, seed: int = 0):
        check_size(size)
        entries, files = read_archives(archives)
        if not entries or set(files) != set(archives):
            raise ValueError(f"no emoji in {', '.join(map(str, archives.values()))}: fetch the packages again")
        self.size, self.scenes, self.held, self.seed, self.styles = size, scenes, held, seed, tuple(archives)
        self.concepts = choose_concepts(entries, files, limit)
        self.pictures = decode_singles(self.concepts, files, size)
        self.things = [c for c in self.concepts if c.group in THINGS and len(c.name.split()) <= 3
                       and (c.name, "") in self.pictures]
        if scenes and len(self.things) < 2:
            raise ValueError(f"scenes need two things, these {len(self.concepts)} emoji have {len(self.things)}: a "
                             "higher --limit, or --scenes 0")
        self.sprites = {(c.name, style): read_image(io.BytesIO(files[style][c.images[""]]), size // 2).numpy()
                        for c in self.things for style in self.styles}

    def __iter__(self):
        yield from self.singles()
        rng = Random(f"scenes {self.seed}")
        for number in range(self.scenes):
            yield self.scene(number, rng)


    def singles(self):
        """Every concept, tone and style once."""
        for concept in self.concepts:
            tones = [tone for tone in concept.images if (concept.name, tone) in self.pictures]
            for tone in tones:
                for style in self.styles:
                    kind = self.single_kind(concept.name, tone, style, tones)
                    yield Item(f"{style}/{concept.name}/{tone}".rstrip("/"), self.pictures[concept.name, tone][style],
                               single_texts(concept, tone, style), "held" if kind else "train", kind)

    def style_held(self, name: str, style: str) -> bool:
        """Whether this style's rendering of a concept is held out: only where another style
        shows the concept.
        """
        return len(self.styles) > 1 and style == self.styles[-1] and hashed_share("style", name) < self.held

    def single_kind(self, name: str, tone: str, style: str, tones: list) -> str:
        """What holding this picture out tests, "" for a picture to train on."""
        if self.style_held(name, style):
            return "style x concept"
        held_tones = [t for t in tones if t and hashed_share("tone", name, t) < self.held]
        return "skin tone x concept" if tone in held_tones and len(held_tones) < len(tones) - 1 else ""


    def scene(self, number: int, rng: Random) -> Item:
        """One kind of thing 1 to 4 times, or a pair in a relation.

        Held-out sprites are in held-out scenes alone.
        """
        style = rng.choice(self.styles)
        one, two = rng.sample(self.things, 2)
        many = rng.random() < 0.4
        names = [one.name] * rng.randint(1, 4) if many else [one.name, two.name]
        relation = None if many else rng.choice(("left of", "above"))
        picture = self.compose(names, style, relation, rng)
        if any(self.style_held(name, style) for name in names):
            kind = "style x concept in a scene"
        elif many:
            kind = "count" if hashed_share("count", names[0], str(len(names))) < self.held else ""
        else:
            kind = "pair" if hashed_share("pair", *sorted(names)) < self.held else ""
        texts = count_texts(names, two.name, style) if many else pair_texts(names, relation, style, rng)
        return Item(f"scene/{number}", picture, texts, "held" if kind else "train", kind)

    def compose(self, names: list, style: str, relation: str | None, rng: Random):
        """Sprites of half the side on white, without overlap, uint8 (size, size, 3)."""
        half, quarter = self.size // 2, self.size // 4
        if relation:  # first and second; across, they may be up to a quarter apart
            corners = [(quarter + rng.randint(-quarter // 2, quarter // 2), x) for x in (0, half)]
            corners = corners if relation == "left of" else [(x, y) for y, x in corners]
        elif len(names) == 1:
            corners = [(rng.randint(0, half), rng.randint(0, half))]
        else:
            corners = rng.sample([(0, 0), (0, half), (half, 0), (half, half)], len(names))
        canvas = self.sprites[names[0], style].repeat(2, 0).repeat(2, 1)
        canvas.fill(255)
        for name, (top, left) in zip(names, corners):
            canvas[top:top + half, left:left + half] = self.sprites[name, style]
        return canvas


def single_texts(concept: Concept, tone: str, style: str) -> list:
    """(task, question, answer) of a picture alone."""
    texts = [("t2i", f"a {style} emoji of {concept.name}" + (f" with {tone} skin" if tone else ""), ""),
             ("mmu", "what is this ?", concept.name), ("mmu", "which style ?", style),
             ("mmu", "which group ?", concept.group)]
    if tone:
        texts.append(("mmu", "which skin tone ?", tone))
    if concept.name.split()[0] in ("man", "woman") and concept.group == "person":
        texts.append(("mmu", "man or woman ?", concept.name.split()[0]))
    return texts


def count_texts(names: list, absent: str, style: str) -> list:
    """(task, question, answer) of a scene of one kind."""
    name, number = names[0], NUMBERS[len(names) - 1]
    return [("t2i", f"a {style} scene of {number} {name}", ""), ("mmu", f"how many {name} ?", number),
            ("mmu", "what is here ?", name), ("mmu", f"is there {name} ?", "yes"),
            ("mmu", f"is there {absent} ?", "no")]


def pair_texts(names: list, relation: str, style: str, rng: Random) -> list:
    """(task, question, answer) of a scene of two things; the question about a side has either
    thing as its answer.
    """
    first, second = names
    other = {"left of": "right of", "above": "below"}[relation]
    stands = rng.random() < 0.5
    claimed = relation if stands else other
    return [("t2i", f"a {style} scene of {first} {relation} {second}", ""),
            ("mmu", f"what is {relation} {second} ?", first),
            ("mmu", f"what is {other} {first} ?", second),
            ("mmu", f"is {first} {claimed} {second} ?", "yes" if stands else "no")]


# Fetching; a folder of pictures for train_toy.py --images

def npm_pack(style: str, into) -> Path:
    """Fetch the npm package of a style into the folder `into`; returns the path of the .tgz."""
    package, npm = f"emoji-datasource-{style}", shutil.which("npm")
    if npm is None:
        raise RuntimeError("npm is missing (it only fetches): install Node.js, https://nodejs.org")
    subprocess.run([npm, "pack", f"{package}@{VERSION}", "--loglevel=error"], cwd=into, check=True)
    return Path(into) / f"{package}-{VERSION}.tgz"


def fetch_emoji(folder: Path) -> dict:
    """{style: .tgz} in this folder, fetched through npm unless they are there.

    ValueError when npm cannot.
    """
    archives = {style: folder / f"{style}-{VERSION}.tgz" for style in STYLES}
    for style, archive in archives.items():
        if not archive.exists():
            print(f"fetching the {style} emoji, about 70 MB")
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                try:
                    os.replace(npm_pack(style, scratch), archive)
                except (RuntimeError, subprocess.CalledProcessError) as error:
                    raise ValueError(f"the emoji cannot be fetched: {error}; the same command tries again") from error
    return archives


def fetch_folder(folder, count: int = 200) -> int:
    """Fill `folder` with `count` emoji in each style, unless it was done; returns how many files.

    Raises ValueError, RuntimeError (npm missing), CalledProcessError (npm failed), FileExistsError.
    """
    # of a call cut short
    folder, ours = Path(folder), {"NOTICE", "NOTICE.tmp", METADATA + ".tmp", *STYLES}
    if count < 1:
        raise ValueError(f"--count must be at least 1, got {count}")
    starts = [f"a {style}" for style in STYLES] * count
    if (folder / METADATA).exists():
        if [text.split(" emoji of ")[0] for _, text in read_metadata(folder)] == starts:
            return len(starts)
    elif {path.name for path in folder.glob("*")} <= ours:
        with tempfile.TemporaryDirectory() as scratch:  # 62 and 74 MB, not kept
            write_folder(folder, {style: npm_pack(style, scratch) for style in STYLES}, count)
        return len(starts)
    raise FileExistsError(f"{folder} holds other things: choose a new or an empty folder")


def write_folder(folder: Path, archives: dict, count: int) -> None:
    """`count` concepts of {style: .tgz} as files, things and short names first; the metadata
    comes last.
    """
    entries, files = read_archives(archives)
    concepts = sorted(choose_concepts(entries, files), key=lambda c: (c.group not in THINGS, len(c.name), c.name))
    if count > len(concepts):
        raise ValueError(f"there are {len(concepts)} emoji, not {count}")
    rows = []
    for style in archives:
        (folder / style).mkdir(parents=True, exist_ok=True)
    for concept in concepts[:count]:
        for style in archives:
            name = f"{style}/{concept.name.replace(' ', '_')}.png"
            (folder / name).write_bytes(files[style][concept.images[""]])
            rows.append({"file_name": name, "text": f"a {style} emoji of {concept.name}"})
    write_notice(folder)
    with whole_file(folder / METADATA) as file:  # a folder with metadata is complete
        file.writelines(json.dumps(row) + "\n" for row in rows)


def write_notice(folder: Path, remark: str = "") -> None:
    """The credits that the licences of the emoji ask for."""
    with whole_file(folder / "NOTICE") as file:
        file.write("".join(f"{name}: {credit}\n" for name, credit in CREDITS.items()) + remark)


def main(argv=None) -> None:
    """Fetch a folder of captioned emoji that `train_toy.py --images` can train on."""
    parser = argparse.ArgumentParser(prog="python -m unimod_mini.data.emoji", description=main.__doc__)
    parser.add_argument("folder", help="a new or an empty folder")
    parser.add_argument("--count", type=int, default=200, help="emoji, each in two styles (200)")
    with command(errors=(OSError, ValueError, RuntimeError, subprocess.CalledProcessError)):
        args = parser.parse_args(argv)
        total = fetch_folder(args.folder, args.count)
        print(f"{args.folder}: {total} pictures of {args.count} emoji, {METADATA} and NOTICE (credits)")
        print(f"next: python train_toy.py --images {args.folder}")


if __name__ == "__main__":
    main()

"""Real pictures with captions, for `train_toy.py --images FOLDER`.

A data set is a folder of pictures and a `metadata.jsonl`, one JSON object a line (the Hugging Face
imagefolder convention; other keys are ignored): {"file_name": "a/1.jpg", "text": "a sleeping cat"}.
`python -m unimod_mini.data.emoji FOLDER` makes one of public emoji art.
"""
import json
import os
from pathlib import Path

import torch

from ..console import progress_bar
from ..image_codecs import Palette, nearest_centres
from ..pictures import read_image
from ..shapes import Prompt, Question
from ..text_codecs import shorten

METADATA = "metadata.jsonl"


def load_image_folder(folder, size=32, limit=None):
    """The first `limit` pictures (None: all) in the order of metadata.jsonl, and their captions.

    Returns N pictures (N, S, S, 3) torch.uint8, S = size, and N strings; an error names its file.
    """
    rows = read_metadata(folder, limit)
    images = torch.empty(len(rows), size, size, 3, dtype=torch.uint8)  # (N, S, S, 3)
    for index, (path, _) in enumerate(progress_bar(rows, "pictures", disable=len(rows) <= 300)):
        images[index] = read_image(path, size)
    return images, [caption for _, caption in rows]


class Pictures:
    """Captioned pictures behind the interface of shapes.World: draw the caption, or describe the
    picture.

    A drawn picture is right when the nearest training picture (pixels, L2) carries its caption. One
    picture a caption: this measures what was memorised, there is no held-out split. patches: a
    k-means palette.
    """
    held_out = ()

    def __init__(self, images, captions, n_codes=256, patch=4):
        if len(images) != len(captions):
            raise ValueError(f"Pictures: one caption a picture, got {len(images)} pictures and "
                             f"{len(captions)} captions")
        # as WordText.decode writes them
        captions = [" ".join(caption.split()) for caption in captions]
        self.captions, palette = captions, Palette.fit(images, n_codes, patch)
        self.patches, self.codes = palette.patches, palette.encode(images)
        self.drawn = palette.decode(self.codes)  # the pictures as the palette can show them
        self.grid = tuple(self.codes.shape[1:])
        self.words = list(dict.fromkeys("describe ? ".split() + " ".join(captions).split()))
        self.longest_text = 2 + max(len(caption.split()) for caption in captions)

    def sample_t2i(self, n, rng, held_out=False):
        """n prompts and their pictures: (list of Prompt, codes (n, h, w))."""
        index = [rng.randrange(len(self.captions)) for _ in range(n)]
        captions = [self.captions[i] for i in index]
        prompts = [Prompt(caption, "caption", (caption,)) for caption in captions]
        return prompts, self.codes[index]

    def sample_mmu(self, n, rng, held_out=False):
        """n times "describe ?", the answers, and the pictures: (list of Question, codes (n, h,
        w)).
        """
        prompts, codes = self.sample_t2i(n, rng)
        return [Question("describe ?", "caption", prompt.text) for prompt in prompts], codes

    sample_prompts = sample_t2i            # training draws the same prompts

    def sample_dialogues(self, n, rng, budget):
        """The same, as dialogues of one question."""
        questions, codes = self.sample_mmu(n, rng)
        return [[question] for question in questions], codes

    def read(self, codes):
        """Codes (B, h, w) -> for every picture the caption of the nearest training picture, in a
        list.
        """
        patches = self.patches.float()
        ours, theirs = patches[codes].flatten(1), patches[self.codes].flatten(1)
        return [[self.captions[i]] for i in nearest_centres(ours, theirs)]

    def fits(self, prompt, things):
        return list(prompt.things) == things


def read_metadata(folder, limit=None):
    """[(path, caption)] of the first `limit` lines; later lines are not looked at.

    Raises FileNotFoundError (no folder, metadata or picture) or ValueError (a bad line).
    """
    metadata = Path(folder) / METADATA
    if not Path(folder).is_dir() or not any(Path(folder).iterdir()):
        raise FileNotFoundError(f"{folder}: the folder is missing or empty")
    if not metadata.is_file():
        raise FileNotFoundError(f'{metadata} is missing; a line: {{"file_name": .., "text": ..}}')
    # Bytes are split, not text: a caption may hold U+2028, where str.splitlines would cut.
    lines = enumerate(metadata.read_bytes().split(b"\n"), start=1)
    lines = [(number, line) for number, line in lines if line.strip()][:limit]
    if not lines:
        raise ValueError(f"{metadata} has no lines (limit {limit})")
    return [_parse_line(line, Path(folder), f"{metadata}, line {n}") for n, line in lines]


def parse_json(text):
    """json.loads; a ValueError, too, for what is nested without end."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError(str(error)) from error


def _parse_line(line, folder, where):
    """A line of metadata.jsonl (bytes) as (path, caption); `where` begins every error."""
    try:
        row = parse_json(line)
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{where}: not JSON ({error})") from error
    return check_row(row, folder, where)


def check_row(row, folder, where):
    """{"file_name": .., "text": ..} as (path, caption); ValueError or FileNotFoundError,
    beginning with `where`.
    """
    for key in ("file_name", "text"):
        value = row.get(key) if isinstance(row, dict) else None
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f'{where}: needs the key "{key}" with a text, not '
                             f"{shorten(repr(value))}")
    name = Path(row["file_name"])
    if name.anchor or ".." in name.parts:  # "/etc/x.png", "C:x.png", "../x.png"
        raise ValueError(f"{where}: {shorten(row['file_name'])!r} leads out of the folder")
    if not os.path.isfile(folder / name):  # Path.is_file raises for a name that is too long
        raise FileNotFoundError(f"{where}: {folder / shorten(row['file_name'])} does not exist")
    return folder / name, row["text"]

"""Pictures to look at: in the terminal, as PNG, and which tokens each layer kept, drawn over the image.

Legend: B pictures, H and W pixels, h and w rows and columns of image codes, T tokens.
"""

import textwrap

import numpy as np
import torch
from torch import Tensor

from . import sources
from .console import shows
from .files import whole_file
from .transformer import inference

DIM = 0.2        # what is left of a skipped patch's contrast to white
RAMP = ".:-=+*#%@"   # from dark to bright


def terminal(images: Tensor, how: str | None = None) -> str:
    """uint8 (B, H, W, 3) -> the pictures side by side, as stdout can show them (how: one of console.shows)."""
    draw = {"blocks": half_blocks, "blanks": blanks, "letters": letters}[how or shows()]
    return "\n".join(" ".join(row) for row in zip(*map(draw, images)))


def half_blocks(image: Tensor) -> list:
    """(H, W, 3) -> lines of two pixel rows each: the upper pixel is the letter's colour, the lower one is behind it."""
    even = torch.cat((image, image[len(image) - len(image) % 2:]))           # below an odd last row stands that row again
    lines = []
    for upper, lower in zip(even[::2].tolist(), even[1::2].tolist()):
        cells = ("\x1b[38;2;{};{};{}m\x1b[48;2;{};{};{}m▀".format(*a, *b) for a, b in zip(upper, lower))
        lines.append("".join(cells) + "\x1b[0m")
    return lines


def blanks(image: Tensor) -> list:
    """(H, W, 3) -> a line for each pixel row, two coloured blanks for a pixel: ASCII alone."""
    lines = []
    for row in image.tolist():
        lines.append("".join("\x1b[48;2;{};{};{}m  ".format(*pixel) for pixel in row) + "\x1b[0m")
    return lines


def letters(image: Tensor) -> list:
    """(H, W, 3) -> a line for each pixel row, two letters for a pixel, the fuller the brighter: no colours."""
    weights = torch.tensor([0.299, 0.587, 0.114], device=image.device)       # of red, green and blue (ITU-R BT.601)
    index = (image.float() @ weights * len(RAMP) / 256).long()               # (H, W)
    return ["".join(2 * RAMP[i] for i in row) for row in index.tolist()]


def save_png(images: Tensor, captions: list, path, scale: int = 8) -> str:
    """A sheet of pictures with their captions. Returns what was done; without pillow, the pip line that is missing."""
    try:
        Image = pillow()
    except ImportError as error:
        return f"{path} not written: {error}"
    from PIL import ImageDraw
    B, H, W, _ = images.shape
    texts = ["\n".join(textwrap.wrap(caption, max(8, W * scale // 6))) for caption in captions]
    columns, cell = min(4, B), (W * scale + 16, H * scale + 16 + 14 * max(1 + text.count("\n") for text in texts))
    sheet = Image.new("RGB", (columns * cell[0], -(-B // columns) * cell[1]), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (image, text) in enumerate(zip(images, texts)):
        x, y = i % columns * cell[0] + 8, i // columns * cell[1] + 8
        sheet.paste(Image.fromarray(image.cpu().numpy()).resize((W * scale, H * scale), Image.NEAREST), (x, y))
        pen.text((x, y + H * scale + 2), text, fill="black")
    with whole_file(path, "wb") as file:
        sheet.save(file, format="PNG")
    return f"{path} written"


def pillow():
    """PIL.Image, or an ImportError that says how to get it."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError('PNG needs pillow: pip install pillow') from error
    return Image


def enlarged(image: Tensor, least: int = 96) -> Tensor:
    """uint8 (H, W, 3) -> every pixel k x k times, k the least number that makes the height `least` pixels."""
    k = -(-least // image.shape[0])
    return image.repeat_interleave(k, 0).repeat_interleave(k, 1)


def write_codes(codes: Tensor, path) -> str:
    """Codes (.., h, w) as an .npy, for the tokenizer that they are of. Returns what was done."""
    with whole_file(path, "wb") as file:
        np.save(file, codes.cpu().numpy())
    return f"{path} written, the codes of {'x'.join(map(str, codes.shape))}"


def read_codes(path, tokenizer) -> Tensor:
    """The .npy of a picture's codes (sources.read_codes), long (h, w). ValueError names the file when it is none."""
    try:
        return torch.from_numpy(sources.read_codes(path, tokenizer.grid, tokenizer.image.n_codes)).long()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def write_png(image: Tensor, path) -> None:
    """One picture, uint8 (H, W, 3), written to a temporary name and renamed."""
    picture = pillow().fromarray(image.cpu().numpy())      # before the file: without pillow there is none
    with whole_file(path, "wb") as file:
        picture.save(file, format="PNG")


@inference
def kept_tokens(model, tokenizer, batch, task: str, routing: str = "causal") -> tuple[Tensor, list, list]:
    """Which tokens of the one sequence in `batch` each routed layer kept.

    Returns the image with the skipped patches faded, (layers, H, W, 3) uint8; a label a layer; and for each layer the
    text with the kept words in [brackets].
    """
    out = model(**batch.inputs(), task=task, routing=routing)
    ids, pictures, labels, texts, special = batch.ids[0], [], [], [], set(tokenizer.special.values())
    is_code = (ids >= tokenizer.image_start) & (ids < tokenizer.image_end)
    codes = (ids[is_code] - tokenizer.image_start).view(1, *tokenizer.grid).cpu()
    image = tokenizer.image.decode(codes)[0]
    if image.dim() == 2:                                   # codes, of which nothing can be seen: black patches
        image = torch.zeros(*image.shape, 3, dtype=torch.uint8)
    for layer, decision in enumerate(out.routing):
        if decision is None:
            continue
        kept = decision.selected[0]
        here = kept[is_code].view(tokenizer.grid).cpu()                                     # (h, w)
        cell = image.shape[0] // tokenizer.grid[0]
        here = here.repeat_interleave(cell, 0).repeat_interleave(cell, 1)[..., None]       # (H, W, 1)
        pictures.append(torch.where(here, image.float(), 255 - DIM * (255 - image.float())).to(torch.uint8))
        labels.append(f"layer {layer}, {routing}: {int(kept[is_code].sum())} of {tokenizer.n_image} patches")
        words = [(tokenizer.name(i), on) for i, on in zip(ids.tolist(), kept.tolist())
                 if i < tokenizer.text.size and i not in special]
        texts.append(" ".join(f"[{word}]" if on else word for word, on in words))
    return torch.stack(pictures) if pictures else image[None][:0], labels, texts

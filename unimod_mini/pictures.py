"""Pictures: in the terminal, to files, from files.

Legend: B pictures, H and W pixels, h and w rows and columns of image codes, k an enlargement.
"""

import contextlib
import textwrap

import numpy as np
import torch
from torch import Tensor

from .atomic_files import whole_file
from .console import shows

# --- In the terminal ---

RAMP = ".:-=+*#%@"                 # from dark to bright
LUMA = (0.299, 0.587, 0.114)       # of red, green and blue (ITU-R BT.601)


def terminal(images: Tensor, how: str | None = None) -> str:
    """uint8 (B, H, W, 3) -> pictures side by side. how: of console.shows; None: as stdout can."""
    draw = {"blocks": half_blocks, "blanks": blanks, "letters": letters}[how or shows()]
    return "\n".join(" ".join(row) for row in zip(*map(draw, images)))


def half_blocks(image: Tensor) -> list:
    """(H, W, 3) -> lines of two pixel rows each: the letter's colour, and what is behind it."""
    last = image[len(image) - len(image) % 2:]             # stands again below an odd last row
    rows = torch.cat((image, last)).tolist()
    lines = []
    for upper, lower in zip(rows[::2], rows[1::2]):
        line = ""
        for a, b in zip(upper, lower):
            line += "\x1b[38;2;{};{};{}m\x1b[48;2;{};{};{}m▀".format(*a, *b)
        lines.append(line + "\x1b[0m")
    return lines


def blanks(image: Tensor) -> list:
    """(H, W, 3) -> a line for each pixel row, two coloured blanks a pixel: ASCII alone."""
    lines = []
    for row in image.tolist():
        cells = ["\x1b[48;2;{};{};{}m  ".format(*pixel) for pixel in row]
        lines.append("".join(cells) + "\x1b[0m")
    return lines


def letters(image: Tensor) -> list:
    """(H, W, 3) -> a line for each pixel row, two letters a pixel, the fuller the brighter."""
    luma = image.float() @ torch.tensor(LUMA, device=image.device)
    index = (luma * len(RAMP) / 256).long()                                    # (H, W)
    return ["".join(2 * RAMP[i] for i in row) for row in index.tolist()]


# --- To files ---

def pillow():
    """PIL.Image, or an ImportError that says how to get it."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("PNG needs pillow: pip install pillow") from error
    return Image


def enlarged(image: Tensor, least: int = 96) -> Tensor:
    """uint8 (H, W, 3) -> every pixel k x k times, the least k that makes `least` pixels high."""
    k = -(-least // image.shape[0])
    return image.repeat_interleave(k, 0).repeat_interleave(k, 1)


def write_png(image: Tensor, path) -> None:
    """One picture, uint8 (H, W, 3)."""
    picture = pillow().fromarray(image.cpu().numpy())      # first: without pillow there is no file
    with whole_file(path, "wb") as file:
        picture.save(file, format="PNG")


def save_png(images: Tensor, captions: list, path, scale: int = 8) -> str:
    """A sheet of pictures with their captions.

    Returns what was done; without pillow, the pip line that is missing.
    """
    try:
        Image = pillow()
    except ImportError as error:
        return f"{path} not written: {error}"
    from PIL import ImageDraw
    B, H, W, _ = images.shape
    width, height = W * scale, H * scale
    texts = ["\n".join(textwrap.wrap(caption, max(8, width // 6))) for caption in captions]
    n_line = 1 + max(text.count("\n") for text in texts)
    columns, cell = min(4, B), (width + 16, height + 16 + 14 * n_line)
    sheet = Image.new("RGB", (columns * cell[0], -(-B // columns) * cell[1]), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (image, text) in enumerate(zip(images, texts)):
        x, y = i % columns * cell[0] + 8, i // columns * cell[1] + 8
        large = Image.fromarray(image.cpu().numpy()).resize((width, height), Image.NEAREST)
        sheet.paste(large, (x, y))
        pen.text((x, y + height + 2), text, fill="black")
    with whole_file(path, "wb") as file:
        sheet.save(file, format="PNG")
    return f"{path} written"


def write_codes(codes: Tensor, path) -> str:
    """Codes (.., h, w) as an .npy, for the tokenizer that they are of. Returns what was done."""
    with whole_file(path, "wb") as file:
        np.save(file, codes.cpu().numpy())
    return f"{path} written, the codes of {'x'.join(map(str, codes.shape))}"


# --- From files ---

# not Pillow's reader of PostScript, which starts a program
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
# at most 8 bits a channel: more would be clipped to white without a word
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")


def open_picture(path, name=None):
    """A picture (path or open file), upright and on white, as Pillow's RGB.

    ValueError, naming it, when it cannot be read.
    """
    Image = pillow()
    from PIL import ImageOps, UnidentifiedImageError
    why = f"{name or path}: cannot be read as a picture"
    try:
        with Image.open(path, formats=FORMATS) as file:
            if file.mode not in MODES:
                raise ValueError(f"mode {file.mode}; save it with 8 bits a channel, as RGB")
            with contextlib.suppress(Exception):           # an odd block says nothing
                file.getexif()
            for block in ("exif", "Raw profile type exif"):    # writing it anew may fail
                file.info.pop(block, None)
            ImageOps.exif_transpose(file, in_place=True)   # upright, as a viewer shows it
            picture = file.convert("RGBA" if file.has_transparency_data else "RGB")
    except FileNotFoundError:
        raise
    except UnidentifiedImageError as error:
        raise ValueError(f"{why} (none of {', '.join(FORMATS)})") from error
    except Exception as error:  # Pillow raises OSError, SyntaxError, DecompressionBombError ..
        raise ValueError(f"{why} ({error})") from error
    if picture.mode == "RGBA":  # white goes under first: no colours of transparent pixels blend in
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture).convert("RGB")
    return picture


def read_image(path, size, name=None) -> Tensor:
    """The picture of open_picture fitted into white, (H, W, 3) uint8. size: (H, W), or S for both.

    64x32 into 32x32: the longer side becomes 32, so 32x16, with 8 white rows above and below.
    """
    height, width = (size, size) if isinstance(size, int) else size
    picture, Image = open_picture(path, name), pillow()
    if width * picture.height <= height * picture.width:   # which side fills the room?
        room, side = width, picture.width
    else:
        room, side = height, picture.height
    across, down = [max(1, round(n * room / side)) for n in picture.size]
    small = shrunk_exactly(picture, (across, down))
    if small is None:
        small = picture.resize((across, down), Image.Resampling.BICUBIC)       # antialiased
    canvas = Image.new("RGB", (width, height), "white")
    canvas.paste(small, ((width - across) // 2, (height - down) // 2))
    pixels = torch.frombuffer(bytearray(canvas.tobytes()), dtype=torch.uint8)
    return pixels.view(height, width, 3)


def shrunk_exactly(picture, size: tuple):
    """The picture that this is an exact enlargement of, as `generate` writes them; else None.

    Bicubic would mix its pixels, and its codes would be others.
    """
    nearest = pillow().Resampling.NEAREST
    if picture.width % size[0] or picture.height % size[1]:
        return None
    small = picture.resize(size, nearest)
    return small if small.resize(picture.size, nearest).tobytes() == picture.tobytes() else None

"""Pictures: from files, to files, in the terminal.

Legend: B pictures, H and W pixels, h and w rows and columns of image codes.
"""

import contextlib
import textwrap

import numpy as np
import torch
from torch import Tensor

from .atomic_files import whole_file
from .console import shows

RAMP = ".:-=+*#%@"   # from dark to bright


def terminal(images: Tensor, how: str | None = None) -> str:
    """uint8 (B, H, W, 3) -> the pictures side by side, as stdout can show them (how: one of
    console.shows).
    """
    draw = {"blocks": half_blocks, "blanks": blanks, "letters": letters}[how or shows()]
    return "\n".join(" ".join(row) for row in zip(*map(draw, images)))


def half_blocks(image: Tensor) -> list:
    """(H, W, 3) -> lines of two pixel rows each: the upper pixel is the letter's colour, the
    lower one is behind it.
    """
    # below an odd last row stands that row again
    even = torch.cat((image, image[len(image) - len(image) % 2:]))
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
    """(H, W, 3) -> a line for each pixel row, two letters for a pixel, the fuller the brighter:
    no colours.
    """
    # of red, green and blue (ITU-R BT.601)
    weights = torch.tensor([0.299, 0.587, 0.114], device=image.device)
    index = (image.float() @ weights * len(RAMP) / 256).long()               # (H, W)
    return ["".join(2 * RAMP[i] for i in row) for row in index.tolist()]


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
    """uint8 (H, W, 3) -> every pixel k x k times, k the least number that makes the height
    `least` pixels.
    """
    k = -(-least // image.shape[0])
    return image.repeat_interleave(k, 0).repeat_interleave(k, 1)


def write_codes(codes: Tensor, path) -> str:
    """Codes (.., h, w) as an .npy, for the tokenizer that they are of. Returns what was done."""
    with whole_file(path, "wb") as file:
        np.save(file, codes.cpu().numpy())
    return f"{path} written, the codes of {'x'.join(map(str, codes.shape))}"


def write_png(image: Tensor, path) -> None:
    """One picture, uint8 (H, W, 3), written to a temporary name and renamed."""
    # before the file: without pillow there is none
    picture = pillow().fromarray(image.cpu().numpy())
    with whole_file(path, "wb") as file:
        picture.save(file, format="PNG")


# From files

# Pillow's reader of PostScript starts a program
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # at most 8 bits a channel


def open_picture(path, name=None, size=None):
    """A picture (path or open file), upright and on white, as Pillow's RGB; ValueError, naming it,
    if unreadable. size: a JPEG may come smaller (draft).
    """
    try:
        # here, because nothing else needs Pillow
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError:
        raise ImportError('needs pillow: pip install pillow')
    try:
        with Image.open(path, formats=FORMATS) as file:
            if file.mode not in MODES:  # 16-bit values would be clipped to white without a word
                raise ValueError(f"mode {file.mode}; save it with 8 bits a channel, as RGB")
            if size and file.format == "JPEG" and file.mode == "RGB":
                draft(file, size)
            with contextlib.suppress(Exception):  # a block that cannot be read says nothing
                file.getexif()
            # read already; writing it anew may fail at any odd entry
            for block in ("exif", "Raw profile type exif"):
                file.info.pop(block, None)
            ImageOps.exif_transpose(file, in_place=True)  # upright, as a viewer shows it
            picture = file.convert("RGBA" if file.has_transparency_data else "RGB")
    except FileNotFoundError:
        raise
    except UnidentifiedImageError as error:
        raise ValueError(f"{name or path}: cannot be read as a picture (none of {', '.join(FORMATS)})") from error
    except Exception as error:  # Pillow raises OSError, SyntaxError, DecompressionBombError ...
        raise ValueError(f"{name or path}: cannot be read as a picture ({error})") from error
    # white goes under first: the resize must not blend in the colours of transparent pixels
    if picture.mode == "RGBA":
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture


def read_image(path, size, name=None):
    """The picture of open_picture fitted into white, (H, W, 3) torch.uint8.

    size: (H, W), or S for both.
    """
    height, width = (size, size) if isinstance(size, int) else size
    picture = open_picture(path, name, max(height, width))
    from PIL import Image
    # 64x32 into 32x32: the longer side becomes 32, so 32x16, with 8 white rows above and below.
    room, side = min((width, picture.width), (height, picture.height), key=lambda pair: pair[0] / pair[1])
    across, down = (max(1, round(n * room / side)) for n in picture.size)
    small = picture.resize((across, down), Image.Resampling.BICUBIC)  # antialiased
    if not (picture.width % across or picture.height % down):
        corners = picture.resize((across, down), Image.Resampling.NEAREST)
        if corners.resize(picture.size, Image.Resampling.NEAREST).tobytes() == picture.tobytes():
            # an exact enlargement, as `generate` writes: bicubic would mix its pixels
            small = corners
    canvas = Image.new("RGB", (width, height), "white")
    canvas.paste(small, ((width - across) // 2, (height - down) // 2))
    return torch.frombuffer(bytearray(canvas.tobytes()), dtype=torch.uint8).view(height, width, 3)


def draft(file, size):
    """Has a JPEG decoded at 1/8, 1/4 or 1/2, where that divides the sides and leaves 8 pixels for
    one: photographs come out within 1 of 255 of what a full decode gives, a few pixels within 3.
    """
    for scale in (8, 4, 2):
        if max(file.size) >= 8 * size * scale and not any(side % scale for side in file.size):
            return file.draft("RGB", tuple(side // scale for side in file.size))

"""unimod_mini.data.image_folder: captioned picture folders."""
import io
import json
import struct
import subprocess
import sys
from random import Random

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from unimod_mini import Palette, World
from unimod_mini.data.image_folder import Pictures, load_image_folder, read_metadata
from unimod_mini.pictures import FORMATS, read_image

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


@pytest.fixture
def Image():
    """PIL.Image, or a skip."""
    return pytest.importorskip("PIL.Image")


def write_folder(folder, rows):
    """Write metadata.jsonl; a row is a dict, or the raw bytes of its line."""
    folder.mkdir(exist_ok=True)
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    (folder / "metadata.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return folder


def solid(Image, path, color, size=(8, 8)):
    """Save one picture of one colour; returns its row of metadata."""
    Image.new("RGB", size, color).save(path)
    return {"file_name": path.name, "text": f"picture {path.stem}"}


def pixel(image, row, column):
    """A pixel as a tuple of three integers."""
    return tuple(image[row, column].tolist())


# ---------------------------------------------------------------- load_image_folder

def test_shapes_order_and_limit(tmp_path, Image):
    """Images are (N, S, S, 3) uint8 in the order of the metadata; a limit keeps the first ones."""
    rows = [solid(Image, tmp_path / f"{name}.png", (shade, 0, 0))
            for name, shade in [("c", 30), ("a", 10), ("b", 20)]]
    write_folder(tmp_path, rows)
    images, captions = load_image_folder(tmp_path, size=5)
    assert images.shape == (3, 5, 5, 3) and images.dtype == torch.uint8
    assert captions == ["picture c", "picture a", "picture b"]
    assert images[:, 0, 0, 0].tolist() == [30, 10, 20]
    few, few_captions = load_image_folder(str(tmp_path), size=5, limit=2)
    assert torch.equal(few, images[:2]) and few_captions == captions[:2]
    assert load_image_folder(tmp_path, limit=99)[0].shape == (3, 32, 32, 3)


def test_near_duplicates_are_told_apart():
    """Sixty pictures that differ by 1, 2, 3 .. in one channel of one pixel: each is read from its
    own codes as itself. And every picture needs a caption.
    """
    one = torch.randint(180, 256, (64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = one.repeat(60, 1, 1, 1)
    for i in range(60):
        images[i, 0, 0, 0] = 100 + i
    pictures = Pictures(images, [f"picture {i}" for i in range(60)], n_codes=400)
    assert len({tuple(codes.flatten().tolist()) for codes in pictures.codes}) == 60
    assert pictures.read(pictures.codes) == [[caption] for caption in pictures.captions]
    with pytest.raises(ValueError, match="one caption a picture, got 60 pictures and 2 captions"):
        Pictures(images, ["a", "b"])


def test_limit_does_not_look_at_later_lines(tmp_path, Image):
    """A line after the limit may be broken; nothing of it is read."""
    write_folder(tmp_path, [solid(Image, tmp_path / "a.png", RED), b"broken"])
    assert len(load_image_folder(tmp_path, limit=1)[1]) == 1


def test_subfolders_blank_lines_and_other_keys(tmp_path, Image):
    """Pictures may lie in subfolders; blank lines, a byte order mark and other keys are ignored."""
    (tmp_path / "deep").mkdir()
    solid(Image, tmp_path / "deep" / "a.png", BLUE)
    line = json.dumps({"id": 7, "file_name": "deep/a.png", "text": "blue"}).encode()
    write_folder(tmp_path, [b"\xef\xbb\xbf" + line + b"\r", b"", b"  ", line])
    images, captions = load_image_folder(tmp_path, size=2)
    assert captions == ["blue", "blue"] and pixel(images[1], 0, 0) == BLUE


def test_progress_bar_only_for_many_pictures(tmp_path, Image, capsys):
    """300 pictures load silently; 301 show a bar."""
    row = solid(Image, tmp_path / "a.png", RED, (1, 1))
    for count, shown in [(300, False), (301, True)]:
        write_folder(tmp_path, [row] * count)
        load_image_folder(tmp_path, size=1)
        assert ("pictures" in capsys.readouterr().err) == shown


# ---------------------------------------------------------------- one picture

@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_become_white(tmp_path, Image, mode):
    """Whatever colour hides under alpha 0, the pixel is white; opaque ones keep their colour."""
    picture = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    picture.putpixel((1, 0), (0, 0, 0, 255))
    picture.convert(mode).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png", 2)
    assert pixel(image, 0, 0) == WHITE and pixel(image, 0, 1) == (0, 0, 0)


def test_half_transparent_blends_with_white(tmp_path, Image):
    """Alpha 128 over white is the mean of the two: black becomes 127."""
    Image.new("RGBA", (4, 4), (0, 0, 0, 128)).save(tmp_path / "a.png")
    assert pixel(read_image(tmp_path / "a.png", 4), 2, 2) == (127, 127, 127)


def test_palette_transparency_becomes_white(tmp_path, Image):
    """A transparent entry of a palette (mode P, as in a GIF) is white too."""
    picture = Image.new("P", (2, 2), 0)
    picture.putpalette([255, 0, 0, 0, 0, 255])
    picture.putpixel((1, 1), 1)
    picture.save(tmp_path / "a.png", transparency=0)
    image = read_image(tmp_path / "a.png", 2)
    assert pixel(image, 0, 0) == WHITE and pixel(image, 1, 1) == BLUE


@pytest.mark.parametrize("mode, fill, suffix, expected", [
    ("1", 1, "png", WHITE), ("L", 90, "png", (90, 90, 90)), ("RGB", BLUE, "bmp", BLUE),
    ("P", 0, "gif", (0, 0, 0)), ("CMYK", (0, 0, 0, 0), "tif", WHITE)])
def test_opaque_modes(tmp_path, Image, monkeypatch, mode, fill, suffix, expected):
    """Grey, palette, CMYK and black-and-white pictures become the same colours in RGB."""
    Image.new(mode, (4, 4), fill).save(tmp_path / f"a.{suffix}")
    # a copy that only transparent pictures need
    monkeypatch.setattr(Image, "alpha_composite", None)
    image = read_image(tmp_path / f"a.{suffix}", 4)
    assert image.shape == (4, 4, 3) and pixel(image, 3, 3) == expected


def test_sixteen_bits_are_refused(tmp_path, Image):
    """A 16-bit picture is an error that names it, not a silently white square."""
    Image.new("I;16", (4, 4), 3000).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match="deep.png.*8 bits"):
        read_image(tmp_path / "deep.png", 4)


def test_wide_picture_is_centred_on_white(tmp_path, Image):
    """64x32 at size 32 is 32x16: 8 white rows, 16 red ones, 8 white ones."""
    solid(Image, tmp_path / "a.png", RED, (64, 32))
    image = read_image(tmp_path / "a.png", 32)
    white, red = torch.tensor(WHITE, dtype=torch.uint8), torch.tensor(RED, dtype=torch.uint8)
    assert (image[:8] == white).all() and (image[24:] == white).all()
    assert (image[8:24] == red).all()


@settings(max_examples=40, deadline=None)
@given(width=st.integers(1, 200), height=st.integers(1, 200), size=st.integers(1, 40))
@example(width=200, height=1, size=32)
def test_aspect_ratio_is_kept(tmp_path_factory, width, height, size):
    """The longer side fills the square, the other is in proportion (at least 1), margins equal."""
    Image = pytest.importorskip("PIL.Image")
    path = tmp_path_factory.mktemp("aspect") / "a.png"
    Image.new("RGB", (width, height), "black").save(path)
    dark = read_image(path, size)[..., 0] == 0  # (S, S)
    rows, columns = dark.any(1).sum().item(), dark.any(0).sum().item()
    assert max(rows, columns) == size and dark.sum() == rows * columns
    assert min(rows, columns) == max(1, round(min(width, height) * size / max(width, height)))
    top, left = dark.any(1).int().argmax().item(), dark.any(0).int().argmax().item()
    assert (top, left) == ((size - rows) // 2, (size - columns) // 2)


@settings(max_examples=40, deadline=None)
@given(width=st.integers(1, 200), height=st.integers(1, 200), size=st.tuples(*2 * [st.integers(1, 40)]))
@example(width=200, height=1, size=(32, 7))
@example(width=60, height=30, size=(10, 20))
def test_a_picture_fits_into_a_rectangle(tmp_path_factory, width, height, size):
    """Size (H, W): one side fills it, the other is in proportion (at least 1), margins equal; (S,
    S) is S.
    """
    Image = pytest.importorskip("PIL.Image")
    path = tmp_path_factory.mktemp("rectangle") / "a.png"
    Image.new("RGB", (width, height), "black").save(path)
    image = read_image(path, size)
    dark = image[..., 0] == 0                              # (H, W)
    rows, columns = dark.any(1).sum().item(), dark.any(0).sum().item()
    scale = min(size[0] / height, size[1] / width)
    assert image.shape == (*size, 3) and dark.sum() == rows * columns
    assert abs(rows - height * scale) <= 0.5 + 1e-6 or rows == 1
    assert abs(columns - width * scale) <= 0.5 + 1e-6 or columns == 1
    assert rows == size[0] or columns == size[1]
    top, left = dark.any(1).int().argmax().item(), dark.any(0).int().argmax().item()
    assert (top, left) == ((size[0] - rows) // 2, (size[1] - columns) // 2)
    assert torch.equal(read_image(path, 9), read_image(path, (9, 9)))


def test_a_rectangle_of_a_large_photograph(tmp_path, Image):
    """A wide JPEG is read in full where its rows decide: 1024x16 in (4, 1024) becomes 256x4."""
    noise = torch.randint(256, (16, 1024, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(noise.numpy()).save(tmp_path / "a.jpg", quality=90)
    Image.open(tmp_path / "a.jpg").save(tmp_path / "a.png")
    small, full = (read_image(tmp_path / name, (4, 1024)) for name in ("a.jpg", "a.png"))
    assert torch.equal(small, full)


@pytest.mark.parametrize("k", range(2, 17))
def test_a_drawing_is_read_back(tmp_path, k):
    """An enlarged drawing of the toy world, as `generate` writes it, has the codes that it was
    drawn from: every patch of the world is among them.
    """
    Image = pytest.importorskip("PIL.Image")
    for world in (World(), World(side=3, margin=1)):
        rng, codec = Random(0), Palette(world.patches)
        scenes = [world.scene(rng, count=world.max_objects, held_out=i % 2) for i in range(60)]
        codes = world.draw(scenes, rng)
        assert codes.unique().numel() == len(world.patches)
        for image, drawn in zip(codec.decode(codes), codes):
            large = image.repeat_interleave(k, 0).repeat_interleave(k, 1)
            Image.fromarray(large.numpy()).save(tmp_path / "a.png")
            read = read_image(tmp_path / "a.png", image.shape[:2])
            assert torch.equal(codec.encode(read[None])[0], drawn)


def test_resize_is_antialiased(tmp_path, Image):
    """A fine checkerboard shrinks to an even grey, not to whichever pixels happen to be picked."""
    board = Image.new("L", (64, 64))
    board.putdata([255 * ((i + i // 64) % 2) for i in range(64 * 64)])
    board.save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png", 8).float()
    assert (image - 127.5).abs().max() < 4


def test_no_colour_bleeds_from_transparent_pixels(tmp_path, Image):
    """Shrinking a white disc on transparent red gives no trace of red."""
    picture = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    picture.paste((255, 255, 255, 255), (20, 20, 43, 43))
    picture.save(tmp_path / "a.png")
    assert (read_image(tmp_path / "a.png", 16) == 255).all()


def test_photographs_stand_upright(tmp_path, Image):
    """The EXIF orientation of a camera is applied: 6 turns the left edge up to the top."""
    picture = Image.new("RGB", (64, 64), "white")
    picture.paste((0, 0, 0), (0, 0, 32, 64))  # the left half is black
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "a.jpg", exif=exif, quality=95)
    image = read_image(tmp_path / "a.jpg", 8).float()
    assert image[:3].max() < 20 and image[5:].min() > 235


def test_an_odd_entry_does_not_lose_a_turned_photograph(tmp_path, Image):
    """An EXIF block whose XResolution (282) is a text, instead of a fraction, still says how the
    picture stands (274).
    """
    entries = struct.pack("<HHIHH", 274, 3, 1, 6, 0) + struct.pack("<HHI4s", 282, 2, 4, b"72\0\0")
    block = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4)
    picture = Image.new("RGB", (64, 64), "white")
    picture.paste((0, 0, 0), (0, 0, 32, 64))
    picture.save(tmp_path / "a.jpg", exif=block, quality=95)
    image = read_image(tmp_path / "a.jpg", 8).float()
    assert image[:3].max() < 20 and image[5:].min() > 235


@pytest.mark.parametrize("format", ("PNG", "WEBP", "JPEG"))
def test_a_block_that_is_no_exif_says_nothing(tmp_path, Image, format):
    """The picture stands as it is stored, in every format."""
    picture = Image.new("RGB", (64, 64), "white")
    picture.paste((0, 0, 0), (0, 0, 32, 64))
    picture.save(tmp_path / "a", format, exif=b"Exif\0\0no TIFF file")
    image = read_image(tmp_path / "a", 8).float()
    assert image[:, :3].max() < 20 and image[:, 5:].min() > 235


def test_missing_pillow_says_what_to_install(tmp_path, monkeypatch):
    """Without Pillow the module imports, and reading a picture names the pip line."""
    monkeypatch.setitem(sys.modules, "PIL", None)  # makes `from PIL import ...` an ImportError
    (tmp_path / "a.png").write_bytes(b"x")
    write_folder(tmp_path, [{"file_name": "a.png", "text": "a"}])
    with pytest.raises(ImportError) as error:
        load_image_folder(tmp_path)
    assert "pip install pillow" in str(error.value)
    assert "pip install pillow" in str(error.value)


# ---------------------------------------------------------------- errors name the file and the line

def test_missing_folder_empty_folder_missing_metadata(tmp_path):
    """Each is a FileNotFoundError that names the path."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "a.png").write_bytes(b"x")
    for name, message in [("nowhere", "nowhere"), ("empty", "empty"),
                          ("bare", r"bare.metadata\.jsonl")]:
        with pytest.raises(FileNotFoundError, match=message):
            load_image_folder(tmp_path / name)


def test_metadata_without_lines(tmp_path):
    """A metadata.jsonl of blank lines is an error that names it."""
    with pytest.raises(ValueError, match=r"metadata\.jsonl"):
        load_image_folder(write_folder(tmp_path, [b"", b" "]))


@pytest.mark.parametrize("bad, message", [
    (b"{'file_name': 'a.png'}", "not JSON"),
    (b'{"file_name": "a.png", "text": "\xff"}', "not JSON"),
    (b'["a.png", "text"]', '"file_name"'),
    ({"text": "a"}, '"file_name"'),
    ({"file_name": 3, "text": "a"}, '"file_name"'),
    ({"file_name": "a.png"}, '"text"'),
    ({"file_name": "a.png", "text": ""}, '"text"'),
    ({"file_name": "a.png", "text": " \n"}, '"text"'),
    ({"file_name": "a.png", "text": ["a"]}, '"text"'),
    ({"file_name": "a.png", "text": None}, '"text"'),
    ({"file_name": "../a.png", "text": "a"}, "../a.png"),
    ({"file_name": "sub/../../a.png", "text": "a"}, "leads out"),
    ({"file_name": "/etc/hostname", "text": "a"}, "leads out")])
def test_bad_lines_name_file_and_line(tmp_path, bad, message):
    """A line that cannot be used is a ValueError with the file, the line number and the reason."""
    folder = write_folder(tmp_path / "set", [{"file_name": "a.png", "text": "fine"}, b"", bad])
    (folder / "a.png").write_bytes(b"x")
    (tmp_path / "a.png").write_bytes(b"x")  # what "../a.png" would reach
    with pytest.raises(ValueError) as error:
        read_metadata(folder)
    assert f"{folder / 'metadata.jsonl'}, line 3: " in str(error.value)
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["gone.png", ".", "x" * 300, "y/" * 2500])
def test_missing_picture_names_file_and_line(tmp_path, name):
    """A picture that is not there, not a file, or cannot be a file, is a FileNotFoundError with
    its path and line.
    """
    folder = write_folder(tmp_path, [{"file_name": name, "text": "a"}])
    with pytest.raises(FileNotFoundError) as error:
        read_metadata(folder)
    assert str(folder / name[:100]) in str(error.value) and "line 1" in str(error.value)
    assert len(str(error.value)) < 200 + 2 * len(str(folder))


@pytest.mark.parametrize("damage", ["text", "empty", "truncated"])
def test_unreadable_pictures_are_named(tmp_path, Image, damage):
    """A file that is no picture, or only part of one, is a ValueError that names it."""
    noise = torch.randint(256, (64 * 64 * 3,), generator=torch.Generator().manual_seed(0))
    whole = io.BytesIO()
    Image.frombytes("RGB", (64, 64), bytes(noise.tolist())).save(whole, "png")
    content = {"text": b"hello", "empty": b"", "truncated": whole.getvalue()[:3000]}[damage]
    (tmp_path / "bad.png").write_bytes(content)
    write_folder(tmp_path, [{"file_name": "bad.png", "text": "a"}])
    with pytest.raises(ValueError, match=r"bad\.png: cannot be read"):
        load_image_folder(tmp_path)


@pytest.mark.parametrize("format", FORMATS)
def test_ordinary_formats_are_read(tmp_path, Image, format):
    """Whatever the file is called: its first bytes say what it is."""
    Image.new("RGB", (8, 8), RED).save(tmp_path / "a", format)
    image = read_image(tmp_path / "a", 4).int()
    assert (image - torch.tensor(RED)).abs().max() < 4


def test_a_photograph_of_a_telephone_is_read(tmp_path, Image):
    """An MPO file is a JPEG with a second picture, and is called .jpg."""
    Image.new("RGB", (8, 8), RED).save(tmp_path / "a.jpg", "MPO", save_all=True,
                                       append_images=[Image.new("RGB", (8, 8), BLUE)])
    assert (read_image(tmp_path / "a.jpg", 4).int() - torch.tensor(RED)).abs().max() < 4


def test_a_picture_that_is_a_program(tmp_path, Image, monkeypatch):
    """PostScript, which Pillow would give to Ghostscript, is refused; the error says what is read,
    and is the same for an open file, wherever that lies in memory.
    """
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("started a program"))
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    (tmp_path / "a.jpg").write_bytes(script)
    message = "a.jpg: cannot be read as a picture .none of JPEG, PNG, WEBP, GIF, BMP, TIFF, PPM.$"
    for file in (tmp_path / "a.jpg", io.BytesIO(script)):
        with pytest.raises(ValueError, match=message):
            read_image(file, 4, "a.jpg")


@settings(max_examples=60, deadline=None)
@given(captions=st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=5),
       ascii_only=st.booleans())
@example(captions=["line\u2028separator", "a\nb", "\x85 next line", "\ufeffmark"], ascii_only=False)
def test_captions_round_trip(tmp_path_factory, captions, ascii_only):
    """Any text that json.dumps can write as one line comes back unchanged, escaped or not."""
    folder = tmp_path_factory.mktemp("captions")
    (folder / "a.png").write_bytes(b"x")
    write_folder(folder, [json.dumps({"file_name": "a.png", "text": text},
                                     ensure_ascii=ascii_only).encode() for text in captions])
    assert [caption for _, caption in read_metadata(folder)] == captions

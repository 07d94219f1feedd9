"""python -m unimod_mini.prepare, work_folder.py and readers.py: from files that people bring to
shards, offline.
"""
import io
import json
import os
import shutil
import subprocess
import tarfile
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import tar_of
from test_emoji import write_archives
from benchmarks import emoji as judged
from unimod_mini import (VQ, ByteText, ModelConfig, Palette, Tokenizer, UnifiedTransformer,
                         WordText, save_checkpoint, vq)
from unimod_mini.data import work_folder as chunks, prepare, emoji
from unimod_mini.image_codecs import cut_patches
from unimod_mini.pictures import read_image
from unimod_mini.data.emoji import CREDITS
from unimod_mini.data.prepare import main, parser
from unimod_mini.data.shards import Shards
from unimod_mini.data.readers import DESCRIBE, Skipped, fingerprint, hashed_share, read_source

Image = pytest.importorskip("PIL.Image")
TINY = "--size 8 --image palette --codes 16 --workers 1".split()
CAPTIONS = [f"picture number {i}" for i in range(12)]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of five entries, so that a dozen make three."""
    monkeypatch.setattr(chunks, "CHUNK", 5)


def png(i, size=8):
    """The bytes of picture i: two colours that no other picture has, one above the other."""
    image = Image.new("RGB", (size, size), (20 * i % 256, 255 - i, i))
    image.paste((i, 7 * i % 256, 200), (0, 0, size, size // 2))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def folder_of(path, captions=CAPTIONS, csv=False):
    """A folder of pictures with metadata.jsonl or captions.csv."""
    path.mkdir()
    for i in range(len(captions)):
        (path / f"{i}.png").write_bytes(png(i))
    rows = [{"file_name": f"{i}.png", "text": text} for i, text in enumerate(captions)]
    if csv:
        (path / "captions.csv").write_text("text,file_name,other\n" + "".join(
            f'"{row["text"]}",{row["file_name"]},x\n' for row in rows))
    else:
        (path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def web_files(numbers):
    """What img2dataset writes for these pictures."""
    files = {}
    for i in numbers:
        files |= {f"{i:09d}.png": png(i), f"{i:09d}.txt": CAPTIONS[i].encode(),
                  f"{i:09d}.json": json.dumps({"caption": "not this", "status": "success"}).encode()}
    return files


def pictures_of(folder, task="t2i"):
    """{(question, answer, picture as the codec draws it)} of both splits."""
    shards = Shards(folder)
    found = set()
    for split in ("train", "held"):
        for i in range(shards.count(task, split)):
            sample = shards.sample(task, i, split)
            picture = shards.tokenizer.image.decode(sample.codes[None])[0]
            found.add((*shards.texts(sample), picture.numpy().tobytes()))
    return found


def texts_of(shards, task, split="train"):
    """[(question, answer)] of all samples."""
    samples = [shards.sample(task, i, split) for i in range(shards.count(task, split))]
    return [shards.texts(sample) for sample in samples]


def is_held(i):
    """Whether picture i is held out at --held 0.4."""
    return hashed_share("split", f"{i}.png") < .4


def run(*arguments):
    main([str(x) for x in arguments])


def no_rubbish(folder):
    return not [path for path in Path(folder).rglob("*") if path.name.endswith(".tmp") or path.name.startswith("tmp")]


# ---------------------------------------------------------------- the command line

def test_the_flags_are_frozen():
    """Names and defaults of the command line."""
    flags = {a.option_strings[0] if a.option_strings else a.dest: a.default for a in parser()._actions
             if a.dest not in ("help", "workers")}
    assert flags == {"sources": None, "out": None, "--backbone": "emu3", "--size": 32, "--image": "vq", "--patch": None,
                     "--codes": None, "--width": None, "--vq-steps": None, "--text": None, "--text-length": None,
                     "--held": 0.05, "--limit": None, "--scenes": None, "--image-root": None, "--changed": None,
                     "--seed": 0, "--device": None}
    assert prepare.DEFAULTS == {"patch": 4, "codes": 1024, "width": 48, "vq_steps": 2000, "scenes": 20_000}
    assert all(f"({value})" in parser().format_help() for value in prepare.DEFAULTS.values())
    assert parser().parse_args(["a", "b", "c"]).sources == ["a", "b"] and parser().parse_args(["a", "b"]).workers >= 1


def test_workers_are_the_cores_that_may_be_used(monkeypatch):
    """In a container of three cores there are three processes, however many the machine has."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 5, 7}, raising=False)
    assert parser().parse_args(["a", "b"]).workers == 3


@pytest.mark.parametrize("arguments, message", [
    (["missing", "out"], "error: missing does not exist; a source is emoji, a folder with metadata.jsonl"),
    (["empty", "out"], "error: empty is no source that can be read: expected emoji, a folder with"),
    (["notes.txt", "out"], "error: notes.txt is no source that can be read"),
    (["bad.json", "out"], "error: bad.json is not JSON"),
    (["object.json", "out"], "error: object.json must hold a list of conversations, it holds a dict"),
    (["unnamed", "out"], "captions.csv: the first line must name the columns file_name and text, it has"),
    (["hopeless", "out"], "error: nothing to train on: 1 entries were read, 0 held out and 1 left out, 1 of them for: not JSON"),
    (["x" * 300, "out"], "error: .*xxx"),
    (["photos", "out", "--vq-steps", "9"], "error: --vq-steps has no effect: --image palette trains no VQ"),
    (["photos", "out", "--width", "9"], "error: --width has no effect: --image palette trains no VQ"),
    (["photos", "out", "--image", "codec.pt", "--codes", "9"], "error: --codes has no effect: codec.pt has its own"),
    (["photos", "out", "--image", "codec.pt", "--patch", "4"], "error: --patch has no effect: codec.pt has its own"),
    (["photos", "out", "--image", "codec.pt", "--width", "9"], "error: --width has no effect: --image codec.pt trains"),
    (["photos", "out", "--scenes", "9"], "error: --scenes has no effect: only emoji has scenes"),
    (["photos", "out", "--image-root", "photos"], "error: --image-root has no effect: no source is a .json"),
    (["photos", "out", "--size", "30"], "error: --size 30 does not divide into patches of 4 pixels"),
    (["photos", "out", "--size", "0"], "error: --size must be at least 1, got 0"),
    (["photos", "out", "--vq-steps", "0"], "error: --vq-steps must be at least 1"),
    (["photos", "out", "--held", "1"], "error: expected 0 <= --held < 1"),
    (["photos", "out", "--codes", "100", "--image", "lfq"], "error: n_codes is 100, .* a power of two for 'lfq'"),
    (["photos", "out", "--image", "vq2"], "error: vq2 is no image tokenizer: expected vq, lfq, palette, or the"),
    (["photos", "out", "--image", "notes.txt"], "error: notes.txt is no image tokenizer"),
    (["photos", "out", "--device", "toaster"], "error: no device 'toaster' here"),
    (["photos", "photos"], "error: photos holds other things: choose a new or an empty folder"),
    (["photos", "notes.txt"], "error: notes.txt holds other things"),
    (["emoji", "photos", "out"], "error: emoji is a data set of its own"),
    (["emoji", "out", "--changed", "add"], "error: --changed has no effect: emoji is always the same"),
    (["emoji", "out", "--size", "30"], "error: scenes are made of halves and quarters")])
def test_errors_in_one_line(tmp_path, monkeypatch, arguments, message):
    """What cannot be done ends the program with one line that says why, and writes no data set."""
    monkeypatch.chdir(tmp_path)
    folder_of(Path("photos"))
    Path("empty").mkdir(), Path("notes.txt").write_text("{}"), Path("bad.json").write_text("[")
    Path("object.json").write_text("{}")
    torch.save(Tokenizer("showo", ByteText(), Palette(torch.zeros(2, 4, 4, 3)), (2, 2), 9).state(), "codec.pt")
    for name, file, text in (("unnamed", "captions.csv", "a,b\n1,2\n"), ("hopeless", "metadata.jsonl", "broken\n")):
        Path(name).mkdir(), (Path(name) / file).write_text(text)
    with pytest.raises(SystemExit, match=message) as error:
        run(*TINY[:4], "--workers", 1, *arguments)
    assert "\n" not in str(error.value) and not list(tmp_path.rglob("*.shard")) and no_rubbish(tmp_path)


def test_npm_that_fails_is_named(tmp_path, monkeypatch):
    """Without npm, or without a network, one line says so; the same command tries again."""
    def fails(style, into):
        raise subprocess.CalledProcessError(1, "npm")
    for npm in (fails, lambda style, into: (_ for _ in ()).throw(RuntimeError("npm is missing"))):
        monkeypatch.setattr(emoji, "npm_pack", npm)
        with pytest.raises(SystemExit, match="error: the emoji cannot be fetched: .*npm.*the same command tries again"):
            run("emoji", tmp_path / "out", *TINY)


# ---------------------------------------------------------------- sources

def test_a_folder_becomes_shards(tmp_path, capsys):
    """Every picture is drawn from its caption and described by it, as near to the original as its
    codec can; bytes are the text; the report names error and codes in use; a sheet shows originals
    over reconstructions.
    """
    run(folder_of(tmp_path / "photos"), tmp_path / "out", *TINY, "--held", 0.4)
    shards, out = Shards(tmp_path / "out"), capsys.readouterr().out
    assert isinstance(shards.tokenizer.text, ByteText) and isinstance(shards.tokenizer.image, Palette)
    assert (shards.tokenizer.grid, shards.tokenizer.text_length) == ((2, 2), 256)
    sides = {"train": [i for i in range(12) if not is_held(i)], "held": [i for i in range(12) if is_held(i)]}
    assert len(sides["train"]) > 3 and len(sides["held"]) > 3
    for split, those in sides.items():
        assert shards.count("t2i", split) == shards.count("mmu", split) == len(those)
        for index, i in enumerate(those):
            image = read_image(tmp_path / "photos" / f"{i}.png", 8)
            drawn, seen = (shards.sample(task, index, split) for task in ("t2i", "mmu"))
            assert shards.texts(drawn) == (CAPTIONS[i], "")
            assert shards.texts(seen) == (DESCRIBE, CAPTIONS[i])
            assert torch.equal(drawn.codes, shards.tokenizer.image.encode(image[None])[0])
            assert torch.equal(drawn.codes, seen.codes)
    assert out.count("come back with a mean error of") == 2 and " codes used, perplexity " in out
    assert "0 left out" in out
    assert (tmp_path / "out" / "skipped.txt").read_text() == "" and no_rubbish(tmp_path)
    held = [json.loads(line) for line in open(tmp_path / "out" / "held.jsonl")]
    for task in ("t2i", "mmu"):
        rows = [row for row in held if row["task"] == task]
        assert [row["key"] for row in rows] == [f"{i}.png" for i in sides["held"]]
        assert [(row["question"], row["answer"]) for row in rows] == texts_of(shards, task, "held")
    sheet = Image.open(tmp_path / "out" / "reconstruction.png")
    assert sheet.width == 4 * (8 * 16 + 16) and sheet.height > 3 * 2 * 8 * 16


def test_the_same_pictures_in_every_format(tmp_path):
    """metadata.jsonl, captions.csv, one tar, a folder of tars: the same samples."""
    folder_of(tmp_path / "a"), folder_of(tmp_path / "b", csv=True), (tmp_path / "d").mkdir()
    tar_of(tmp_path / "c.tar", web_files(range(12)))
    tar_of(tmp_path / "d" / "00000.tar", web_files(range(7)))
    tar_of(tmp_path / "d" / "00001.tar", web_files(range(7, 12)))
    found = []
    for source in ("a", "b", "c.tar", "d"):
        run(tmp_path / source, tmp_path / f"out-{source}", *TINY, "--held", 0)
        found.append(pictures_of(tmp_path / f"out-{source}"))
        assert {line for line in open(tmp_path / f"out-{source}" / "skipped.txt")} == set()
    assert len(found[0]) == 12 and all(those == found[0] for those in found)


def test_questions_and_captions_in_one_data_set(tmp_path):
    """A LLaVA file beside an image folder: a sample a turn, <image> taken out; a picture that both
    have is stored once and lies on one side.
    """
    folder_of(tmp_path / "photos")
    turns = lambda *texts: [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    box = turns("<image>\nWhat is it?", "A box.", "Which?", "The blue one.")
    entries = [{"id": 1, "image": "3.png", "conversations": box},
               {"id": 2, "image": "4.png", "conversations": turns("Why?\n<image>", "Because.")}]
    (tmp_path / "q.json").write_text(json.dumps(entries))
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, entries)))
    for name in ("q.json", "q.jsonl"):
        out = tmp_path / f"out-{name}"
        run(tmp_path / "photos", tmp_path / name, out, *TINY, "--held", 0.4, "--image-root", tmp_path / "photos")
        shards = Shards(out)
        found = Counter()
        for split in ("train", "held"):
            for i in range(shards.count("mmu", split)):
                codes = shards.sample("mmu", i, split).codes
                question, answer = shards.texts(shards.sample("mmu", i, split))
                if question != DESCRIBE:
                    number = 3 if question != "Why?" else 4
                    assert torch.equal(codes, shards.tokenizer.image.encode(
                        read_image(tmp_path / "photos" / f"{number}.png", 8)[None])[0])
                    assert (split == "held") == is_held(number)
                    found[question, answer] += 1
        assert found == {("What is it?", "A box."): 1, ("Which?", "The blue one."): 1, ("Why?", "Because."): 1}
        assert sum(shards.count("t2i", split) for split in ("train", "held")) == 12
        assert sum(shards.about["pictures"].values()) == 12 and shards.about["repeated_pictures"] == 2


def test_what_is_broken_is_listed_and_the_rest_is_kept(tmp_path):
    """Broken pictures, missing files, bad lines, tars that end early, samples without picture or
    text, conversations that are none: each is named in skipped.txt with the reason; everything else
    is there.
    """
    photos = folder_of(tmp_path / "photos")
    (photos / "2.png").write_bytes(png(2)[:40])
    with open(photos / "metadata.jsonl", "a") as file:
        file.write('{"file_name": "gone.png", "text": "x"}\nnot json\n\n{"file_name": "3.png", "text": " "}\n')
        file.write(json.dumps({"file_name": "n" * 300, "text": "x"}))
    tars = tmp_path / "tars"
    tars.mkdir()
    files = {"a/1.txt": b"alone", "a/2.png": png(20), "a/3.png": png(21), "a/3.json": b'{"caption": "from json"}',
             "a/4.png": png(22), "a/4.json": b"[", "a/5.png": b"no png", "a/5.txt": b"broken",
             "a/6.png": png(23), "a/6.json": b'{"caption": ["list"]}', "a/7.png": png(24), "a/7.txt": b"caf\xe9"}
    tar_of(tars / "0.tar", files)
    cut = tar_of(tmp_path / "whole.tar", web_files([8, 9])).read_bytes()
    (tars / "1.tar").write_bytes(cut[:-10240 + 700] if len(cut) > 10240 else cut[:3000])
    (tars / "2.tar").write_bytes(b"")
    questions = [{"image": "1.png", "conversations": []}, {"conversations": []}, 7,
                 {"image": "../x", "conversations": []},
                 {"image": "1.png", "conversations": [{"from": "gpt", "value": "a"}, {"from": "human", "value": "b"}]},
                 {"image": "n" * 5000, "conversations": []}, {"image": "1.png", "conversations": [{"from": []}]},
                 {"image": "1.png", "conversations": [{"from": [], "value": "a"}, {"from": "gpt", "value": "b"}]},
                 {"image": "1.png", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": " "}]}]
    (tmp_path / "q.json").write_text(json.dumps(questions))
    run(photos, tars, tmp_path / "q.json", tmp_path / "out", *TINY, "--held", 0, "--image-root", photos)
    skipped = (tmp_path / "out" / "skipped.txt").read_text().splitlines()
    for start in ("2.png: cannot be read as a picture", "metadata.jsonl, line 13: ",
                  "metadata.jsonl, line 14: not JSON", 'metadata.jsonl, line 16: needs the key "text"',
                  "metadata.jsonl, line 17: ", "0.tar/a/6: the \"caption\" in its .json must be a text, not ['list']",
                  "0.tar/a/7: its .txt is not UTF-8", "q.json, entry 5: ",
                  'q.json, entry 6: needs "conversations", a list of {"from": .., "value": text}',
                  "q.json, entry 7: turns must go human", "q.json, entry 8: an answer is empty",
                  "0.tar/a/1: no picture among .txt", "0.tar/a/2: no caption",
                  "0.tar/a/4: its .json is no JSON object", "0.tar/a/5: cannot be read as a picture",
                  "1.tar: the rest of it cannot be read", "2.tar: the rest of it cannot be read",
                  "q.json, entry 0: turns must go human", 'q.json, entry 1: needs the key "image"',
                  'q.json, entry 2: needs "conversations"',
                  "q.json, entry 3: '../x' leads out of the folder", "q.json, entry 4: turns must go human, gpt"):
        assert sum(line.startswith(start) for line in skipped) == 1, (start, skipped)
    questions = {question for question, _, _ in pictures_of(tmp_path / "out")}
    assert questions == {*CAPTIONS[:2], *CAPTIONS[3:], "from json"}
    assert Shards(tmp_path / "out").about["skipped_pictures"] == len(skipped) == 22
    assert max(map(len, skipped)) < 200 + len(str(photos))


def test_names_that_are_no_utf8(tmp_path):
    """A Latin-1 name in a tar and in a folder: the picture counts, held out or not, and is
    listed when it is broken.
    """
    name, photos = os.fsdecode(b"caf\xe9.png"), folder_of(tmp_path / "photos", CAPTIONS)
    (photos / "2.png").rename(photos / name)
    (photos / os.fsdecode(b"\xe9.png")).write_bytes(b"broken")
    rows = [{"file_name": "5.png", "text": "a"}, {"file_name": name, "text": "b"}, {"file_name": os.fsdecode(b"\xe9.png"), "text": "c"}]
    (photos / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tar = tar_of(tmp_path / "a.tar", {name: png(6), name.replace("png", "txt"): b"d"})
    for held in (0, .9):
        run(photos, tar, tmp_path / f"out{held}", *TINY, "--held", held)
        assert {question for question, _, _ in pictures_of(tmp_path / f"out{held}")} == {"a", "b", "d"}
        assert (tmp_path / f"out{held}" / "skipped.txt").read_text().startswith("\\udce9.png: cannot be read as a picture")
    keys = {json.loads(row)["key"] for row in (tmp_path / "out0.9" / "held.jsonl").read_text().splitlines()}
    assert name in keys and "a.tar/" + name.removesuffix(".png") in keys


def test_a_csv_that_breaks_off(tmp_path):
    """A field that is too long for a table loses its row; what is before and behind is kept."""
    photos = folder_of(tmp_path / "photos", csv=True)
    with open(photos / "captions.csv", "a") as file:
        file.write("x" * 140_000 + ",1.png,x\nlater,2.png,x\n")
    *entries, broken, later = read_source(photos)
    assert len(entries) == 12 and isinstance(broken, Skipped) and broken.key == "captions.csv, line 14"
    assert broken.why.startswith("cannot be read (field larger than") and later.texts[0] == ("t2i", "later", "")


def test_a_damaged_tar_says_so_wherever_it_breaks(tmp_path):
    """Cut in a file, in a header or between two files: what is before counts, and the rest is
    listed. A whole tar, also an empty one, lists nothing.
    """
    whole = tar_of(tmp_path / "whole.tar", web_files(range(6))).read_bytes()
    third = starts_of(tmp_path / "whole.tar")[6]           # three files a sample
    for cut, why in ((third, "there is no end mark: perhaps it is cut short"),
                     (third + 100, "there is no end mark"),
                     (third + 600, "the rest of it cannot be read (unexpected end of data)")):
        (tmp_path / "cut.tar").write_bytes(whole[:cut])
        *items, last = read_source(tmp_path / "cut.tar")
        assert [item.texts[0][1] for item in items] == CAPTIONS[:2]
        assert last.key == "cut.tar" and last.why.startswith(why)
    assert len(list(read_source(tmp_path / "whole.tar"))) == 6
    assert list(read_source(tar_of(tmp_path / "empty.tar", {}))) == []


def starts_of(tar):
    """The place of every header."""
    with tarfile.open(tar) as archive:
        return [member.offset for member in archive]


def read_and_listed(tar):
    """The captions of what is read, and {key: why} of what is not."""
    entries = list(read_source(tar))
    listed = {entry.key: entry.why for entry in entries if isinstance(entry, Skipped)}
    return [entry.texts[0][1] for entry in entries if not isinstance(entry, Skipped)], listed


@pytest.mark.parametrize("damage", (b"?" * 512, bytes(512)))
def test_what_lies_behind_damage_is_read(tmp_path, damage):
    """A header that is overwritten takes its own file along and is listed by its place; no file
    before it goes with one behind it, and the rest is read.
    """
    files = web_files(range(4))
    whole = bytearray(tar_of(tmp_path / "a.tar", files).read_bytes())
    starts = starts_of(tmp_path / "a.tar")
    whole[starts[4]:starts[4] + 512] = damage  # of the caption, between picture and .json
    (tmp_path / "a.tar").write_bytes(whole)
    entries = list(read_source(tmp_path / "a.tar"))
    assert [entry.texts[0][1] for entry in entries[:1] + entries[4:]] == [CAPTIONS[i] for i in (0, 2, 3)]
    bytes_ = f"bytes {starts[4]} to {starts[5]} are no entry: it is damaged, or compressed"
    assert entries[1:4] == [("a.tar/000000001", "no caption"), ("a.tar", bytes_),
                            ("a.tar/000000001", "no picture among .json")]


def test_a_compressed_tar_is_refused(tmp_path):
    """Pictures are read by their place in a tar, and in a compressed one they have none."""
    noise = np.random.default_rng(0).bytes(2000)
    tar_of(tmp_path / "a.tar", {"0.png": noise, "0.txt": b"noise"}, "w:gz")
    size = (tmp_path / "a.tar").stat().st_size
    why = f"bytes 0 to {size} are no entry: it is damaged, or compressed"
    assert list(read_source(tmp_path / "a.tar")) == [("a.tar", why)]


def test_archives_one_behind_the_other(tmp_path):
    """cat a.tar b.tar: the samples of both, also where one archive is empty."""
    parts = [tar_of(tmp_path / "part.tar", web_files(those)).read_bytes()
             for those in (range(2), (), range(2, 4))]
    (tmp_path / "a.tar").write_bytes(b"".join(parts))
    assert read_and_listed(tmp_path / "a.tar") == (CAPTIONS[:4], {})


def test_a_header_for_all_members_is_no_damage(tmp_path):
    """`git archive` begins with a header that belongs to every file, and holds a commit."""
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT,
                      pax_headers={"comment": "1edc134"}) as archive:
        for name, content in web_files(range(2)).items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    assert read_and_listed(tmp_path / "a.tar") == (CAPTIONS[:2], {})


def test_samples_of_one_name_side_by_side(tmp_path):
    """A suffix that comes again begins another sample: five pictures are called image.png."""
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for i in range(5):
            for suffix, content in (("png", png(i)), ("txt", CAPTIONS[i].encode())):
                member = tarfile.TarInfo(f"image.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    assert read_and_listed(tmp_path / "a.tar") == (CAPTIONS[:5], {})


@pytest.mark.parametrize("kind, why", ((tarfile.LNKTYPE, "1.png is a link: store the file itself"),
                                       (tarfile.SYMTYPE, "1.png is a link: store the file itself"),
                                       (tarfile.FIFOTYPE, "1.png is no plain file: store the file itself"),
                                       (tarfile.GNUTYPE_SPARSE, "1.png is no plain file: store the file itself")))
def test_links_are_listed(tmp_path, kind, why):
    """A member whose bytes are elsewhere leaves its sample out, by name; a folder is nothing."""
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, content in (web_files([0]) | {"1.png": b"", "1.txt": b"one"}).items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            member.type, member.linkname = (kind, "0.png") if name == "1.png" else (tarfile.REGTYPE, "")
            archive.addfile(member, io.BytesIO(content))
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
    assert read_and_listed(tmp_path / "a.tar") == (CAPTIONS[:1], {"a.tar/1": why})


def test_hidden_files_part_no_sample(tmp_path):
    """A tar of macOS has ._0.png between 0.png and 0.txt: it is listed, and the sample is whole."""
    tar = tar_of(tmp_path / "a.tar", {"p/0.png": png(0), "p/._0.png": b"?", "p/0.txt": b"zero"})
    assert read_and_listed(tar) == (["zero"], {"a.tar/p/._0.png": "a hidden file belongs to no sample"})


def test_a_table_with_captions_that_would_be_wrong(tmp_path):
    """A comma outside of quotes, a text that is not UTF-8 and an odd quote lose their row, a quote
    that is never closed the rest: none of them becomes a shorter, a garbled or a longer caption.
    Commas at the end are no caption's.
    """
    photos = folder_of(tmp_path / "photos", csv=True)
    rows = ["file_name,text", "0.png,a cat, sleeping", "1.png,un caf\xe9", '5.png,"a cat" ', '2.png,"two, quoted",,',
            '3.png,"open', "4.png,four"]
    (photos / "captions.csv").write_bytes("\n".join(rows).encode("latin-1"))
    comma, latin, odd, item, rest = read_source(photos)
    assert odd == ("captions.csv, line 4", "cannot be read (',' expected after '\"')")
    assert comma == ("captions.csv, line 2", "more columns than the first line names, from ' sleeping' on: a text with commas "
                     "needs quotes")
    assert latin == ("captions.csv, line 3", r"not UTF-8: 'un caf\udce9'; save the table as UTF-8")
    assert item.texts[0] == ("t2i", "two, quoted", "")
    assert isinstance(rest, Skipped) and rest.why == "cannot be read (unexpected end of data)"


def test_brackets_without_end(tmp_path):
    """JSON that is nested too deeply to be read is one more thing that is listed, in each of the
    formats.
    """
    deep, photos = "[" * 100_000, folder_of(tmp_path / "photos")
    with open(photos / "metadata.jsonl", "a") as file:
        file.write(deep + "\n")
    (tmp_path / "q.jsonl").write_text(deep)
    tar = tar_of(tmp_path / "a.tar", {"0.png": png(0), "0.json": deep.encode()})
    for source, count in ((photos, 12), (tmp_path / "q.jsonl", 0), (tar, 0)):
        *items, last = read_source(source)
        assert len(items) == count and isinstance(last, Skipped)
    (tmp_path / "q.json").write_text(deep)
    with pytest.raises(ValueError, match="q.json is not JSON"):
        list(read_source(tmp_path / "q.json"))


def test_a_caption_is_the_same_in_every_format(tmp_path):
    """Blanks around it and the mark that Windows puts in front of a text file are no part of it."""
    photos = folder_of(tmp_path / "photos", [])
    (photos / "0.png").write_bytes(png(0))
    (photos / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "text": " a cat \n"}))
    tar = tar_of(tmp_path / "a.tar", {"0.png": png(0), "0.txt": b"\xef\xbb\xbfa cat\r\n"})
    assert [item.texts[0][1] for source in (photos, tar) for item in read_source(source)] == ["a cat"] * 2


def test_pictures_that_were_not_there_yet(tmp_path):
    """No picture can be read: an error. When they are there, --changed anew reads them."""
    photos = folder_of(tmp_path / "photos")
    names = [photos / f"{i}.png" for i in range(12)]
    for name in names:
        name.rename(name.with_suffix(".away"))
    said = "error: nothing to train on: 12 entries were read, 0 held out and 12 left out, 12 of them for: .*0.png does not"
    for _ in range(2):
        with pytest.raises(SystemExit, match=said):
            run(photos, tmp_path / "out", *TINY)
    for name in names:
        name.with_suffix(".away").rename(name)
    run(photos, tmp_path / "out", *TINY, "--changed", "anew")
    assert sum(Shards(tmp_path / "out").about["pictures"].values()) == 12


def test_the_most_frequent_reason_is_named(tmp_path):
    """Reasons are counted by their words: two captions in numbers are one, three links another."""
    skipped = [("a", "no caption"), ("b", "1.png is a link"), ("c", "no caption"), ("d", "'no caption' is a link"),
               ("e", '"what\'s this" is a link')]
    assert prepare.nothing_left("5 entries", 0, skipped) == (
        "nothing to train on: 5 entries were read, 0 held out and 5 left out, 3 of them for: 1.png is a link (b)")
    folder_of(tmp_path / "p", CAPTIONS[:2])
    with pytest.raises(SystemExit, match="error: nothing to train on: 2 entries were read, 2 held out and 0 left out$"):
        run(tmp_path / "p", tmp_path / "out", *TINY, "--held", 0.99999)


@pytest.mark.parametrize("held", (0, 0.4))
def test_no_text_to_train_on(tmp_path, monkeypatch, held):
    """All training texts are over the budget: an error, also when a held-out one fits; nothing
    looks finished then, not even when the second try is killed before its end.
    """
    captions = ["short" if is_held(i) and held else "far too long for it" for i in range(12)]
    folder_of(tmp_path / "p", captions)
    with open(tmp_path / "p" / "metadata.jsonl", "a") as file:
        file.write("broken\n" * 30)                        # no reason why nothing is left
    command = [tmp_path / "p", tmp_path / "out", *TINY, "--held", held, "--text-length", 16]
    fit = 2 * captions.count("short")                      # drawn and described
    said = f"24 texts were read, {fit} held out and {24 - fit} left out, {24 - fit} of them for: .* over the budget of 16"
    with pytest.raises(SystemExit, match=said):
        run(*command)
    out = tmp_path / "out"
    assert not (out / "dataset.json").exists() and "over the budget" in (out / "skipped.txt").read_text()
    real = Path.unlink
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda path, **how: (
            real(path, **how) if how or path.name != "dataset.json" else 1 / 0))
        with pytest.raises(ZeroDivisionError):
            run(*command)
    with pytest.raises(SystemExit, match=said):
        run(*command)


def test_suffixes_in_capitals(tmp_path):
    """A tar with 1.PNG and 1.TXT has a picture with a caption."""
    item, = read_source(tar_of(tmp_path / "a.tar", {"1.PNG": png(1), "1.TXT": b"one"}))
    assert item.key == "a.tar/1" and item.texts[0] == ("t2i", "one", "") and item.picture.size == len(png(1))


# ---------------------------------------------------------------- repeats, splits, budgets

def test_a_repeated_picture_is_stored_once_and_on_one_side(tmp_path):
    """The same pixels under another name: the same text is dropped, another one is kept, on the
    side of the first.
    """
    photos = folder_of(tmp_path / "photos")
    with open(photos / "metadata.jsonl", "a") as file:
        for i in range(12):
            # other bytes, the same pixels
            Image.open(photos / f"{i}.png").save(photos / f"copy-{i}.bmp")
            for text in (CAPTIONS[i], f"again {i}", f"again {i}"):
                file.write(json.dumps({"file_name": f"copy-{i}.bmp", "text": text}) + "\n")
    run(photos, tmp_path / "out", *TINY, "--held", 0.4)
    shards = Shards(tmp_path / "out")
    found = {split: Counter(question for question, _ in texts_of(shards, "t2i", split))
             for split in ("train", "held")}
    for i, text in enumerate(CAPTIONS):
        side, other = ("held", "train") if is_held(i) else ("train", "held")
        assert found[side][text] == found[side][f"again {i}"] == 1
        assert found[other][text] == found[other][f"again {i}"] == 0
    assert sum(map(len, found.values())) == 24 and sum(shards.about["pictures"].values()) == 12


@given(keys=st.lists(st.text(), min_size=1, max_size=20, unique=True), share_held=st.floats(0, 1))
def test_the_split_of_a_picture_depends_on_its_key_alone(keys, share_held):
    """Whatever else is in the data, and in whichever order; a larger share only adds to what is
    held out.
    """
    held = {key for key in keys if hashed_share("split", key) < share_held}
    assert held == {key for key in reversed(keys) if hashed_share("split", key) < share_held}
    assert held <= {key for key in keys if hashed_share("split", key) < min(1, share_held + .1)}
    assert all(0 <= hashed_share("split", key) < 1 for key in keys)


def test_the_held_out_share_is_about_what_was_asked():
    """5 % of 20,000 names within four standard deviations."""
    assert sum(hashed_share("split", f"{i:09d}") < .05 for i in range(20_000)) == pytest.approx(1000, abs=124)


@pytest.mark.parametrize("text, budget, too_long", [("bytes", 40, 39), ("words", 7, 6)])
def test_texts_over_budget_are_listed_and_never_cut(tmp_path, text, budget, too_long):
    """A caption that does not fit is left out of the task that it does not fit, and quoted; the
    rest is whole.
    """
    unit = "x" if text == "bytes" else "w "
    captions = ["short", (unit * (too_long + 2)).strip(), (unit * (too_long - 1)).strip()]
    folder_of(tmp_path / "p", captions)
    run(tmp_path / "p", tmp_path / "out", *TINY, "--held", 0, "--text", text, "--text-length", budget)
    assert {question for question, _, _ in pictures_of(tmp_path / "out")} == {captions[0], captions[2]}
    assert {answer for _, answer, _ in pictures_of(tmp_path / "out", "mmu")} == {"short"}
    skipped = (tmp_path / "out" / "skipped.txt").read_text().splitlines()
    assert len(skipped) == 3 and all("is over the budget of" in line for line in skipped)
    assert sum(captions[1] in line for line in skipped) == 2


def test_words_of_the_data(tmp_path):
    """--text words: the words of all texts, the prompts, the size of emu3's header; a budget for
    the longest text.
    """
    run(folder_of(tmp_path / "p"), tmp_path / "out", *TINY, "--held", 0.4, "--text", "words", "--backbone", "emu3")
    tokenizer = Shards(tmp_path / "out").tokenizer
    assert isinstance(tokenizer.text, WordText) and tokenizer.backbone == "emu3" and tokenizer.text_length == 2 + 3 + 2
    assert set(tokenizer.text.words) == {"USER:", "ASSISTANT:", "2*2", "picture", "number", "describe", "?",
                                         *map(str, range(12))}
    assert (tmp_path / "out" / "skipped.txt").read_text() == ""


# ---------------------------------------------------------------- the codec

@pytest.mark.parametrize("kind", ("vq", "lfq"))
def test_a_trained_codec_is_stored_and_loaded(tmp_path, kind):
    """A VQ is trained on training pictures alone (another held-out picture changes nothing in it),
    lies in tokenizer.pt, and makes the codes of another data set.
    """
    photos = folder_of(tmp_path / "photos")
    tiny, sizes = ["--size", 8, "--workers", 1, "--held", 0.4, "--device", "cpu"], ["--codes", 16, "--width", 4]
    run(photos, tmp_path / "one", *tiny, *sizes, "--image", kind, "--vq-steps", 3)
    one = Shards(tmp_path / "one")
    assert isinstance(one.tokenizer.image, VQ)
    assert one.tokenizer.image.quantizer == {"vq": "nearest", "lfq": "lfq"}[kind]
    run(photos, tmp_path / "two", *tiny, "--image", tmp_path / "one" / "tokenizer.pt")
    assert pictures_of(tmp_path / "one") == pictures_of(tmp_path / "two")
    assert one.tokenizer_hash == Shards(tmp_path / "two").tokenizer_hash
    held = next(filter(is_held, range(12)))
    (photos / f"{held}.png").write_bytes(png(40))
    run(photos, tmp_path / "three", *tiny, *sizes, "--image", kind, "--vq-steps", 3)
    assert Shards(tmp_path / "three").tokenizer_hash == one.tokenizer_hash


def test_the_training_of_a_codec_goes_on(tmp_path, monkeypatch):
    """Stopped in the middle, the training of a VQ goes on from its last state, which is gone in
    the end.
    """
    photos, tiny = folder_of(tmp_path / "photos"), ["--size", 8, "--codes", 16, "--width", 4, "--workers", 1]
    monkeypatch.setattr(vq, "SAVE_EVERY", 2)
    run(photos, tmp_path / "once", *tiny, "--vq-steps", 5)
    real, steps = VQ.quantize, []

    def stops(self, latents):
        steps.append(1)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return real(self, latents)

    monkeypatch.setattr(VQ, "quantize", stops)
    with pytest.raises(SystemExit, match="130"):
        run(photos, tmp_path / "twice", *tiny, "--vq-steps", 5)
    assert (tmp_path / "twice" / "work" / "training.pt").exists()
    with monkeypatch.context() as patch:                   # killed before training.pt is removed
        patch.setattr(Path, "unlink", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(photos, tmp_path / "twice", *tiny, "--vq-steps", 5)
    assert (tmp_path / "twice" / "work" / "codec.pt").exists()
    run(photos, tmp_path / "twice", *tiny, "--vq-steps", 5)
    assert len(steps) == 4 + 3                             # two of the five were saved
    assert files_of(tmp_path / "once") == files_of(tmp_path / "twice")
    assert not (tmp_path / "twice" / "work" / "training.pt").exists()


def test_large_pictures_are_fewer(tmp_path, monkeypatch):
    """The codec is trained on as many pictures as fit into the bytes that are allowed, one at
    least.
    """
    given, real = [], prepare.train_vq
    monkeypatch.setattr(prepare, "train_vq", lambda images, *rest, **options: given.append(len(images)) or real(
        images, *rest, **options))
    photos = folder_of(tmp_path / "photos")
    for limit in (10**6, 5 * 8 * 8 * 3, 1):
        monkeypatch.setattr(prepare, "FIT_BYTES", limit)
        run(photos, tmp_path / f"out{limit}", "--size", 8, "--image", "vq", "--codes", 4, "--width", 4, "--vq-steps", 1,
            "--held", 0, "--workers", 1)
    assert given == [12, 5, 1]


def test_a_palette_is_fitted_on_a_sample(monkeypatch):
    """Of 122,880 patches 50,000 become floats, those that a sample of all patches as floats
    would hold.
    """
    images = torch.randint(256, (30, 128, 128, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    vectors, generator = cut_patches(images, 2).flatten(0, 2), torch.Generator().manual_seed(7)
    vectors = vectors[torch.randperm(len(vectors), generator=generator)[:50_000]].unique(dim=0)
    twin = vectors[torch.randperm(len(vectors), generator=generator)[:9]].view(9, 2, 2, 3)
    sizes, real = [], torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda x: sizes.append(x.numel()) or real(x))
    assert torch.equal(Palette.fit(images, 9, 2, rounds=0, seed=7).patches, twin.byte()) and max(sizes) <= 50_000 * 12


def test_pictures_of_the_codec_are_held_once(tmp_path):
    """Pictures are read into their place: beside the result, one at a time is in memory."""
    pixels, made = torch.randint(256, (40, 32, 32, 3)).byte(), chunks.Chunks(tmp_path)
    made.append([], pixels.numpy())
    tracemalloc.start()                                    # sees arrays, and no tensor
    numbers, images = prepare.some_pictures(made, list(range(40)), 30, seed=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert torch.equal(images, pixels[numbers]) and peak < images.numel() / 2


def test_a_perfect_codec_has_no_psnr(tmp_path):
    """Where every pixel is right, dataset.json says null: JSON has no infinity."""
    run(folder_of(tmp_path / "photos"), tmp_path / "out", *TINY, "--held", 0, "--codes", 99)
    about = json.loads((tmp_path / "out" / "dataset.json").read_text(), parse_constant=pytest.fail)
    assert about["reconstruction"]["train"]["error"] == 0 and about["reconstruction"]["train"]["psnr"] is None


# ---------------------------------------------------------------- stopped and resumed

def files_of(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


@pytest.mark.parametrize("where", ["decode 1", "decode 8", "save pixels", "fit", "save codec", "codes", "judge",
                                   "shards", "skipped"])
def test_stopped_anywhere_and_resumed(tmp_path, monkeypatch, capsys, where):
    """Stopped in any stage, the same command goes on: what was finished is not done again, no
    half-written file stays, and the data set is, byte for byte, that of a run which was not
    stopped.
    """
    photos = folder_of(tmp_path / "photos")
    once = [photos, tmp_path / "once", *TINY, "--held", 0.4]
    run(*once)
    calls = Counter()
    real = {"decode": chunks.decode, "fit": prepare.fit_codec, "judge": prepare.judge_codec,
            "shards": prepare.write_shards, "save": chunks.np.save, "whole": prepare.whole_file,
            "codes": Palette.encode}

    def stops(name, at=1):
        def function(*arguments, **more):
            calls[name] += 1
            if calls[name] == at:
                raise KeyboardInterrupt
            return real[name](*arguments, **more)
        return function

    with monkeypatch.context() as patch:
        name, _, at = where.partition(" ")
        if name == "decode":
            patch.setattr(chunks, "decode", stops("decode", int(at)))
        elif where == "save pixels":
            patch.setattr(chunks.np, "save", stops("save", 2))
        elif where == "skipped":
            patch.setattr(prepare, "whole_file", lambda path, *mode: (
                stops("whole") if path.name == "skipped.txt" else real["whole"])(path, *mode))
        elif name == "codes":
            patch.setattr(Palette, "encode", stops("codes", 2))
        else:
            function = {"fit": "fit_codec", "judge": "judge_codec", "shards": "write_shards",
                        "save": "save_data"}[name]
            patch.setattr(prepare, function, stops(name))
        with pytest.raises(SystemExit, match="130"):
            run(photos, tmp_path / "twice", *TINY, "--held", 0.4)
    assert "stopped: the same command goes on from here\n" in capsys.readouterr().err
    work = tmp_path / "twice" / "work"
    done = {path.name: path.stat().st_mtime_ns for path in work.iterdir() if path.suffix not in (".tmp", ".json")}
    run(photos, tmp_path / "twice", *TINY, "--held", 0.4)
    for name, time in done.items():
        assert (work / name).stat().st_mtime_ns == time, name
    one, two = files_of(tmp_path / "once"), files_of(tmp_path / "twice")
    assert one == two and no_rubbish(tmp_path / "twice") and "train-t2i-00000.shard" in one
    run(photos, tmp_path / "twice", *TINY, "--held", 0.4)
    assert "twice is finished" in capsys.readouterr().out and files_of(tmp_path / "twice") == two


def test_other_options_are_refused(tmp_path):
    """A folder that was begun, finished or not, work deleted or not, is not gone on with by
    other options.
    """
    photos = folder_of(tmp_path / "photos")
    run(photos, tmp_path / "out", *TINY)
    for _ in range(2):
        with pytest.raises(SystemExit, match="out was begun with --size 8, not 16: give the same options, or another"):
            run(photos, tmp_path / "out", *TINY, "--size", 16)
        run(photos, tmp_path / "out", *TINY)
        for path in (tmp_path / "out" / "work").iterdir():
            path.unlink()


def test_one_path_by_two_names(tmp_path, monkeypatch):
    """photos is ./photos: the same data set goes on."""
    folder_of(tmp_path / "photos"), (tmp_path / "q.json").write_text("[]")
    monkeypatch.chdir(tmp_path)
    for dot in ("", "./"):
        run(dot + "photos", dot + "q.json", "out", *TINY, "--image-root", dot + "photos")


CHANGES = {"more": lambda photos: add_picture(photos, 12),
           "a name": lambda photos: (photos / "x").write_bytes(b""),
           "a size": lambda photos: (photos / "3.png").write_bytes(png(3) + b" "),
           "a time": lambda photos: os.utime(photos / "3.png"),
           "a link": lambda photos: (photos / "5.png").unlink() or (photos / "5.png").symlink_to("4.png"),
           "less": lambda photos: (photos / "3.png").unlink()}


def add_picture(photos, i):
    """One more line and its picture."""
    (photos / f"{i}.png").write_bytes(png(i))
    with open(photos / "metadata.jsonl", "a") as file:
        file.write(json.dumps({"file_name": f"{i}.png", "text": f"picture number {i}"}) + "\n")


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("state", ("finished", "without work", "read", "half read"))
def test_a_source_that_changed_is_refused(tmp_path, change, state):
    """Whatever of its files is another one, and however far the run came, it is not gone on with,
    nor finished; what is there stays as it is. With the files as they were it is.
    """
    photos = folder_of(tmp_path / "photos")
    shutil.copytree(photos, tmp_path / "kept")
    run(photos, tmp_path / "out", *TINY)
    work = tmp_path / "out" / "work"
    gone = {"finished": [], "without work": list(work.iterdir()), "read": [tmp_path / "out" / "skipped.txt"],
            "half read": [work / "pictures.done", work / "records-000002.jsonl", tmp_path / "out" / "skipped.txt"]}
    for path in gone[state]:
        path.unlink()
    CHANGES[change](photos)
    before = files_of(tmp_path / "out"), files_of(work)
    offer = "nothing can be added, for work/ was deleted" if state == "without work" else "--changed add reads what was added"
    with pytest.raises(SystemExit, match=f"error: the sources are not what they were when .*out was begun .13 files and .* "
                                         f"bytes then, 1[234] files and .* now; .*: {offer}, --changed anew begins again"):
        run(photos, tmp_path / "out", *TINY)
    assert (files_of(tmp_path / "out"), files_of(work)) == before
    shutil.rmtree(photos)
    shutil.copytree(tmp_path / "kept", photos)             # with their times
    run(photos, tmp_path / "out", *TINY)


def test_what_a_fingerprint_covers(tmp_path):
    """Folders in folders, through links too, that may go round, the pictures of questions, and a
    tar; not what is made of them.
    """
    photos, far = folder_of(tmp_path / "photos"), folder_of(tmp_path / "far")
    (photos / "deep").mkdir()
    (photos / "round").symlink_to("."), (photos / "nothing").symlink_to("gone"), (photos / "far").symlink_to(far)
    (tmp_path / "q.json").write_text("[]"), tar_of(tmp_path / "a.tar", {})
    sources = [str(tmp_path / "a.tar"), str(tmp_path / "q.json")]
    seen = [fingerprint(sources, photos, photos / "out")]
    assert seen[0]["files"] == 2 + 13 + 13                 # with metadata.jsonl, each once
    for name in ("photos/deep/a", "far/b", "a.tar", "q.json", "photos/c"):
        (tmp_path / name).write_bytes(name.encode())
        seen.append(fingerprint(sources, photos, photos / "out"))
    for name in ("photos/c", "far/b"):  # two files change places, and so their sizes
        os.utime(tmp_path / name, (0, 0))
    seen.append(fingerprint(sources, photos, photos / "out"))
    (photos / "c").rename(photos / "d"), (far / "b").rename(photos / "c"), (photos / "d").rename(far / "b")
    seen.append(fingerprint(sources, photos, photos / "out"))
    assert len({about["sha256"] for about in seen}) == len(seen)
    (photos / "out" / "work").mkdir(parents=True), (photos / "out" / "work" / "x").write_bytes(b"x")
    assert fingerprint(sources, photos, photos / "out") == seen[-1]
    assert fingerprint(sources, photos, tmp_path / "elsewhere") != seen[-1]
    assert fingerprint(["emoji"], None, photos) is None
    beside = fingerprint(sources[1:], None, photos / "out")  # no folder of pictures named
    assert beside["bytes"] > sum(path.stat().st_size for path in far.iterdir())


def test_a_data_set_that_noted_no_sources(tmp_path):
    """One of an earlier version cannot be called finished."""
    photos, out = folder_of(tmp_path / "photos"), tmp_path / "out"
    run(photos, out, *TINY)
    (out / "work" / "options.json").unlink()
    about = json.loads((out / "dataset.json").read_text())
    (out / "dataset.json").write_text(json.dumps({key: about[key] for key in ("options", "counts")}))
    with pytest.raises(SystemExit, match="begun .unknown files and unknown bytes then, 13 files and"):
        run(photos, out, *TINY)


def test_what_was_added_is_read(tmp_path, capsys):
    """--changed add: the codec and the side of each picture stay, the new ones are there, and then
    it is finished, as the same command says and the one without the flag.
    """
    photos, out = folder_of(tmp_path / "photos"), tmp_path / "out"
    options = [photos, out, *TINY, "--held", 0.4]
    run(*options)
    first, codec, held = Shards(out), (out / "work" / "codec.pt").read_bytes(), pictures_of(out)
    for i in range(12, 20):
        add_picture(photos, i)
    capsys.readouterr()
    run(*options, "--changed", "add")
    assert "is finished" not in capsys.readouterr().out
    assert (out / "work" / "codec.pt").read_bytes() == codec and held < pictures_of(out)
    assert Shards(out).tokenizer_hash == first.tokenizer_hash and len(pictures_of(out)) == 20
    keys = {json.loads(line)["key"] for line in open(out / "held.jsonl")}
    assert keys == {f"{i}.png" for i in range(20) if is_held(i)} and Shards(out).about["sources"]["files"] == 21
    for more in (["--changed", "add"], ["--changed", "anew"], []):
        before = files_of(out)
        run(*options, *more)
        assert "is finished" in capsys.readouterr().out and files_of(out) == before


@pytest.mark.parametrize("how", ("add", "anew"))
@pytest.mark.parametrize("where", range(7))
def test_a_change_that_is_stopped_goes_on(tmp_path, monkeypatch, how, where):
    """Stopped at any file that it writes, the same command ends as if it had not been stopped;
    until then it is not finished.
    """
    photos, files = folder_of(tmp_path / "photos"), []
    for out in ("once", "twice"):
        run(photos, tmp_path / out, *TINY)
    for i in range(12, 16):
        add_picture(photos, i)
    run(photos, tmp_path / "once", *TINY, "--changed", how)
    real = os.replace

    def stops(*names):
        files.append(names)
        if len(files) == where + 1:
            raise KeyboardInterrupt
        real(*names)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stops)
        with pytest.raises(SystemExit, match="130"):
            run(photos, tmp_path / "twice", *TINY, "--changed", how)
    assert how == "add" or where or not files_of(tmp_path / "twice")         # deleted first
    chunks = (tmp_path / "twice" / "work").glob("records-*.jsonl")
    done = {path: path.stat().st_mtime_ns for path in chunks}
    run(photos, tmp_path / "twice", *TINY, "--changed", how)
    assert done == {path: path.stat().st_mtime_ns for path in done}          # and not again
    assert files_of(tmp_path / "once") == files_of(tmp_path / "twice")
    assert len(Shards(tmp_path / "twice").about["sources"]) == 3 and len(pictures_of(tmp_path / "twice")) == 16


@pytest.mark.parametrize("change, message", [
    (lambda lines: lines[3:], "out was begun, 0.png is now 3.png: --changed anew"),
    (lambda lines: lines[:4], "out was begun, 4.png is now its end: --changed anew"),
    (lambda lines: [line.replace('"text": "', '"text": "new ') for line in lines],
     "out was begun, 0.png is now another text: --changed anew")])
def test_to_add_is_to_keep_what_was_read(tmp_path, change, message):
    """Where entries that were read are others now, nothing can be added, and the data set stays;
    `anew` makes the one that an empty folder would get, and leaves what is not its own alone.
    """
    photos, out = folder_of(tmp_path / "photos"), tmp_path / "out"
    run(photos, out, *TINY, "--held", 0)
    before = files_of(out)
    lines = (photos / "metadata.jsonl").read_text().splitlines(keepends=True)
    (photos / "metadata.jsonl").write_text("".join(change(lines)))
    with pytest.raises(SystemExit, match=f"error: the source changed since .*{message} begins again"):
        run(photos, out, *TINY, "--held", 0, "--changed", "add")
    assert files_of(out) == before
    (out / "notes.txt").write_text("mine"), (out / "work" / "notes.txt").write_text("mine")
    run(photos, out, *TINY, "--held", 0, "--changed", "anew")
    run(photos, tmp_path / "new", *TINY, "--held", 0)
    assert files_of(out) == files_of(tmp_path / "new") | {"notes.txt": b"mine"}
    assert files_of(out / "work") == files_of(tmp_path / "new" / "work") | {"notes.txt": b"mine"}


def test_without_work_nothing_is_added(tmp_path):
    """The pictures that were read are gone: to begin again is what is left."""
    photos, out = folder_of(tmp_path / "photos"), tmp_path / "out"
    run(photos, out, *TINY)
    shutil.rmtree(out / "work")
    add_picture(photos, 12)
    for more in ([], ["--changed", "add"]):
        with pytest.raises(SystemExit, match="nothing can be added, for work/ was deleted, --changed anew begins again"):
            run(photos, out, *TINY, *more)
    run(photos, out, *TINY, "--changed", "anew")
    assert sum(Shards(out).about["pictures"].values()) == 13


def test_stopped_before_the_first_file(tmp_path):
    """A folder in which nothing but the options was begun is taken up."""
    (tmp_path / "out" / "work").mkdir(parents=True)
    (tmp_path / "out" / "work" / "options.json.tmp").write_text("{")
    run(folder_of(tmp_path / "photos"), tmp_path / "out", *TINY)
    assert sum(Shards(tmp_path / "out").about["pictures"].values()) == 12 and no_rubbish(tmp_path)


def test_a_pool_of_processes_gives_the_same(tmp_path):
    """Two processes write what one does, broken pictures in the same places."""
    photos = folder_of(tmp_path / "photos")
    (photos / "5.png").write_bytes(b"no picture")
    run(photos, tmp_path / "one", *TINY)
    run(photos, tmp_path / "two", *TINY[:-1], 2)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_a_process_that_is_killed_ends_the_program():
    """Out of memory, the system kills a process: an error says so, where waiting for its
    pictures would never end.
    """
    with pytest.raises(ValueError, match="a process that read pictures was killed.*with fewer --workers if need be"):
        with chunks.pool_map(2) as map_:
            list(map_(os._exit, [9]))


def test_many_chunks_need_few_files(tmp_path):
    """200 chunks, some of them empty, are opened and read in any order with 64 open files."""
    made = chunks.Chunks(tmp_path)
    for i in range(200):
        made.append([], np.full((i % 3, 2, 2, 3), i, np.uint8))
    before = len(os.listdir("/dev/fd"))
    made = chunks.Chunks(tmp_path)
    owners = [i for i in range(200) for _ in range(i % 3)]
    assert [int(made.picture("pixels", n)[0, 0, 0]) for n in reversed(range(len(owners)))] == owners[::-1]
    assert len(os.listdir("/dev/fd")) - before <= chunks.OPEN == 64


def test_finished_codes_need_no_pixels(tmp_path, monkeypatch):
    """Where all codes are there, no picture is read and nothing encoded."""
    run(folder_of(tmp_path / "photos"), tmp_path / "out", *TINY)
    made = chunks.Chunks(tmp_path / "out" / "work")
    monkeypatch.setattr(chunks.Chunks, "array", None)
    prepare.write_codes(made, codec=None)


def test_limit_takes_the_first_entries(tmp_path):
    """--limit counts entries of the sources, broken ones too."""
    photos = folder_of(tmp_path / "photos")
    (photos / "1.png").write_bytes(b"")
    run(photos, tmp_path / "out", *TINY, "--held", 0, "--limit", 4)
    assert {question for question, _, _ in pictures_of(tmp_path / "out")} == {CAPTIONS[i] for i in (0, 2, 3)}


# ---------------------------------------------------------------- emoji, end to end

def test_emoji_end_to_end(tmp_path, monkeypatch):
    """`emoji` fetches once, writes words, both credits, recombination splits whose kinds
    held.jsonl names.
    """
    fetched = []

    def pack(style, into):
        fetched.append(style)
        return write_archives(Path(into))[style]
    monkeypatch.setattr(emoji, "npm_pack", pack)
    options = ["emoji", tmp_path / "out", *TINY, "--scenes", 150, "--held", 0.2, "--backbone", "showo"]
    run(*options)
    shards = Shards(tmp_path / "out")
    assert fetched == ["google", "twitter"] and isinstance(shards.tokenizer.text, WordText)
    notice = (tmp_path / "out" / "NOTICE").read_text()
    assert all(credit in notice for credit in ("Noto Emoji", "Twemoji", "CC-BY 4.0", *shards.about["credits"]))
    held = [json.loads(line) for line in open(tmp_path / "out" / "held.jsonl")]
    assert {row["kind"] for row in held} == {"style x concept", "skin tone x concept", "pair", "count",
                                             "style x concept in a scene"} == set(shards.about["held_by_kind"])
    for task in ("t2i", "mmu"):
        rows = [row for row in held if row["task"] == task]
        assert [(row["question"], row["answer"]) for row in rows] == texts_of(shards, task, "held")
    train = {question for question, _ in texts_of(shards, "t2i")}
    kept_apart = {row["question"] for row in held if row["task"] == "t2i"}
    assert train and kept_apart and not train & kept_apart
    assert (tmp_path / "out" / "skipped.txt").read_text() == "" and CREDITS["names"] in notice


def test_the_sheet_shows_originals_on_top(tmp_path):
    """The top half of the first cell is one of the pictures, enlarged 16 times."""
    photos = folder_of(tmp_path / "photos")
    run(photos, tmp_path / "out", *TINY, "--held", 0)
    with Image.open(tmp_path / "out" / "reconstruction.png") as sheet:
        cell = torch.from_numpy(np.array(sheet)[8:8 + 128:16, 8:8 + 128:16])
    assert any(torch.equal(cell, read_image(photos / f"{i}.png", 8)) for i in range(12))


def test_a_long_caption_leaves_the_sheet_small(tmp_path):
    """A caption of a book's length is cut under its picture, and in what is said of it when it
    is over the budget.
    """
    photos = folder_of(tmp_path / "photos", ["word " * 20_000] + CAPTIONS[1:])
    run(photos, tmp_path / "out", *TINY, "--held", 0)
    with Image.open(tmp_path / "out" / "reconstruction.png") as sheet:
        assert sheet.height < 1500
    skipped = (tmp_path / "out" / "skipped.txt").read_text().splitlines()
    assert len(skipped) == 2 and all("is over the budget" in line and len(line) < 300 for line in skipped)


def test_the_judge_of_emoji_runs(tmp_path, monkeypatch, capsys):
    """benchmarks/emoji.py: the judge learns what tells the styles apart; noise and empty answers
    are found out.
    """
    monkeypatch.setattr(emoji, "npm_pack", lambda style, into: write_archives(Path(into))[style])
    run("emoji", tmp_path / "data", *TINY, "--scenes", 40, "--held", 0.2)
    tokens = Shards(tmp_path / "data").tokenizer
    torch.manual_seed(0)
    config = ModelConfig("emu3", 1, 1, 1, 8, 16, tokens.vocab_size, 64, image_start=tokens.image_start)
    save_checkpoint(tmp_path / "model.pt", UnifiedTransformer(config), tokenizer=tokens.state())
    monkeypatch.setattr("sys.argv", ["emoji.py", str(tmp_path / "data"), f"noise={tmp_path / 'model.pt'}", "--drawn", "9",
                                     "--asked", "30", "--judge-steps", "40", "--out", str(tmp_path / "judged")])
    judged.main()
    results = json.loads((tmp_path / "judged" / "emoji.json").read_text())
    assert results["judge"]["real train"]["style"] > 0.8 and results["drawn"]["noise train"]["concept"] < 0.3
    assert results["judge"]["real train"]["pictures"] == 9 and results["answered"]["noise"]["all"] < 0.2
    assert 0.2 < results["answered"]["blind"]["all"] < 1 and "style x concept" in results["answered"]["blind"]
    assert "the judge on" in capsys.readouterr().out
    assert all((tmp_path / "judged" / f"emoji-{split}.png").exists() for split in ("train", "held"))


def test_the_verdict_counts_pictures_that_are_right_in_both():
    """Four pictures: right, another style, another concept, neither; a concept that the judge
    does not know is left out.
    """
    names = {"concept": ["ox", "fog"], "style": ["google", "twitter"], "group": ["all"]}
    judge = judged.Judge(names)
    said = {"concept": [0, 0, 1, 1], "style": [0, 1, 0, 1], "group": [0, 0, 0, 0]}
    judge.forward = lambda images: {head: torch.eye(len(names[head]))[torch.tensor(those)] for head, those in said.items()}
    ox, cat = (judged.Picture("", concept, "google", "all", torch.zeros(8, 8, 3)) for concept in ("ox", "cat"))
    found = judged.verdict(judge, [ox, cat, ox, ox, ox], torch.zeros(5, 8, 8, 3, dtype=torch.uint8))
    assert found == {"pictures": 4, "concept": 0.5, "style": 0.5, "both": 0.25, "group": 1.0, "concept in 5": 1.0}

"""unimod_mini.data.emoji: captions, questions, layout and splits of the emoji world, on a tiny
stand-in for the packages; the folder that train_toy.py reads.
"""
import io
import json
import subprocess
import sys
from collections import Counter, defaultdict

import numpy as np
import pytest

from helpers import tar_of
from unimod_mini.data import emoji
from unimod_mini.data.image_folder import load_image_folder, read_metadata
from unimod_mini.data.emoji import NUMBERS, STYLES, TONES, Emoji, check_size, plain

Image = pytest.importorskip("PIL.Image")
CATEGORIES = ("Animals & Nature", "Food & Drink", "Objects", "Symbols", "Flags")


def entry(number, name, category, tones=()):
    """An entry of emoji.json, with the keys that are read."""
    variants = {code: {"image": f"{number}-{code}.png".lower()} for code in tones}
    return {"name": name, "category": category, "sort_order": number, "image": f"{number}.png",
            **({"skin_variations": variants} if tones else {})}


def make_entries():
    """40 things and signs, 6 activities of men and women with five tones, and what must be left
    out.
    """
    names = [f"{a}{b}-{a}X" if a == "K" else f"{a}{b} thing" for a in "KLMN" for b in "ABCDEFGHIJ"]
    entries = [entry(i, name, CATEGORIES[i % 5]) for i, name in enumerate(names)]
    people = [f"{who} {what}" for what in ("SURFING", "RUNNING", "CLIMBING") for who in ("MAN", "WOMAN")]
    entries += [entry(50 + i, name, "People & Body", TONES) for i, name in enumerate(people)]
    return entries + [entry(70, "KA-KX", "Symbols"), entry(71, "TWIN", "Symbols"), entry(72, "GONE", "Symbols"),
                      entry(73, "ONE TWO THREE FOUR FIVE SIX SEVEN", "Symbols"), entry(74, "TONE", "Component"),
                      entry(75, "Côte d’Ivoire & Réunion Flag", "Flags")]


def colour(image, style):
    """A colour for every file and style; TWIN (71) looks as entry 1 does."""
    number, _, tone = image.removesuffix(".png").partition("-")
    number = 1 if number == "71" else int(number)
    green = 40 * (list(TONES).index(tone.upper()) + 1) if tone else 10
    return 3 * number + 5, green, 200 if style == "google" else 90


def write_archives(folder, entries=None, styles=STYLES):
    """{style: .tgz} in the layout of the npm packages; GONE is not drawn by the last style."""
    entries, archives = make_entries() if entries is None else entries, {}
    for style in styles:
        archives[style] = folder / f"emoji-datasource-{style}-16.0.0.tgz"
        files = {"package/emoji.json": json.dumps(entries).encode()}
        for item in entries:
            for image in (item["image"], *(v["image"] for v in item.get("skin_variations", {}).values())):
                if not (item["name"] == "GONE" and style == styles[-1]):
                    buffer = io.BytesIO()
                    Image.new("RGBA", (64, 64), (*colour(image, style), 255)).save(buffer, "PNG")
                    files[f"package/img/{style}/64/{image}"] = buffer.getvalue()
        tar_of(archives[style], files, "w:gz")
    return archives


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return Emoji(write_archives(tmp_path_factory.mktemp("npm")), size=16, scenes=1500, held=0.2, seed=3)


@pytest.fixture(scope="module")
def items(world):
    return list(world)


def caption(item):
    return next(question for task, question, _ in item.texts if task == "t2i")


def asked(item):
    return [(question, answer) for task, question, answer in item.texts if task == "mmu"]


def scene_of(item):
    """(style, names, relation) of a scene, from its caption."""
    _, style, _, _, *words = caption(item).split()
    if words[0] in NUMBERS:
        return style, [" ".join(words[1:])] * (NUMBERS.index(words[0]) + 1), None
    relation = "left of" if "left of" in " ".join(words) else "above"
    return style, " ".join(words).split(f" {relation} "), relation


# ---------------------------------------------------------------- what is chosen

@pytest.mark.parametrize("given_, expected", [
    ("T-REX", "t rex"), ("Côte d’Ivoire Flag", "cote divoire flag"), ("KEYCAP: *", "keycap"), ("A & B", "a and b"),
    ("St. Martin Flag", "st martin flag"), ("Åland Islands Flag", "aland islands flag"), ("無", "")])
def test_plain_names(given_, expected):
    """Names become lower-case ASCII words."""
    assert plain(given_) == expected


def test_concepts(world):
    """Every plain name once, with the tones that both styles draw; what a style lacks, long names,
    components and pictures that look like an earlier one are left out. A limit takes some of them,
    the same ones every time.
    """
    names = {concept.name for concept in world.concepts}
    assert {"ka kx", "la thing", "woman surfing", "cote divoire and reunion flag"} < names and len(names) == 48
    assert not names & {"gone", "tone"} and not any("seven" in name for name in names)
    assert sorted({name for name, _ in world.pictures}) == sorted(names - {"twin"})
    assert {tone for name, tone in world.pictures if name == "man running"} == {"", *TONES.values()}
    assert all(concept.group in ("nature", "food", "object") for concept in world.things)


def test_singles(world, items):
    """Every concept, tone and style once, in its own pixels, with a caption and questions that
    follow from names.
    """
    singles = [item for item in items if not item.key.startswith("scene/")]
    assert len(singles) == 2 * (41 + 6 * 6) == len({item.key for item in singles})
    for item in singles:
        style, name, *tone = item.key.split("/")
        concept = next(c for c in world.concepts if c.name == name)
        image = concept.images[tone[0] if tone else ""]
        assert item.picture.shape == (16, 16, 3) and item.picture.dtype == np.uint8
        assert (item.picture == np.array(colour(image, style), np.uint8)).all()
        assert caption(item) == f"a {style} emoji of {name}" + (f" with {tone[0]} skin" if tone else "")
        expected = [("what is this ?", name), ("which style ?", style), ("which group ?", concept.group)]
        expected += [("which skin tone ?", word) for word in tone]
        expected += [("man or woman ?", name.split()[0])] * (concept.group == "person")
        assert asked(item) == expected


# ---------------------------------------------------------------- scenes

def test_scenes_show_what_their_captions_say(items):
    """Half-size sprites of the named things and style, as many as named, whole and on white; the
    first is left of or above the second; every answer follows from the picture.
    """
    for item in (item for item in items if item.key.startswith("scene/")):
        style, names, relation = scene_of(item)
        number = {name: next(i for i, e in enumerate(make_entries()) if plain(e["name"]) == name) for name in names}
        places, area = {}, 0
        for name in set(names):
            own = np.array(colour(f"{number[name]}.png", style), np.uint8)
            rows, columns = np.nonzero((item.picture == own).all(-1))
            assert len(rows) == 64 * names.count(name)
            places[name], area = (rows.mean(), columns.mean()), area + len(rows)
        assert area + (item.picture == 255).all(-1).sum() == 256
        for question, answer in asked(item):
            assert answer == answer_of(question, names, relation)
        if relation:
            axis = relation == "left of"
            assert places[names[0]][axis] + 7.9 < places[names[1]][axis]


def answer_of(question, names, relation):
    """The answer to a question about a scene, from what is in it."""
    if question.startswith("how many"):
        return NUMBERS[names.count(question.removeprefix("how many ").removesuffix(" ?")) - 1]
    if question == "what is here ?":
        return names[0]
    if question.startswith("is there "):
        return "yes" if question.removeprefix("is there ").removesuffix(" ?") in names else "no"
    truths = {relation: tuple(names), {"left of": "right of", "above": "below"}[relation]: tuple(names[::-1])}
    for word, (first, second) in truths.items():
        if question == f"what is {word} {second} ?":
            return first
        if question == f"is {first} {word} {second} ?":
            return "yes"
    assert question.startswith("is ") and all(name in question for name in names)
    return "no"


def test_scenes_are_balanced(items):
    """Relations, styles and yes/no answers are about even, all counts occur, both kinds of scene
    occur.
    """
    scenes = [item for item in items if item.key.startswith("scene/")]
    said = Counter(answer for item in scenes for question, answer in asked(item) if question.startswith("is "))
    styles = Counter(scene_of(item)[0] for item in scenes)
    relations = Counter(scene_of(item)[2] for item in scenes)
    counts = Counter(len(scene_of(item)[1]) for item in scenes if scene_of(item)[2] is None)
    assert said["yes"] == pytest.approx(said["no"], rel=.15) and styles["google"] == pytest.approx(750, abs=97)
    assert relations[None] == pytest.approx(600, abs=95) and relations["above"] == pytest.approx(450, abs=89)
    assert set(counts) == {1, 2, 3, 4} and min(counts.values()) > 90


# ---------------------------------------------------------------- splits

def test_held_out_styles(items):
    """A held-out rendering is Twitter's, Google's rendering of the concept is trained on, and no
    training scene has the held-out sprite.
    """
    train = {item.key for item in items if item.split == "train"}
    held = [item.key.split("/") for item in items if item.kind == "style x concept"]
    assert held and {style for style, *_ in held} == {"twitter"}
    names = {name for _, name, *_ in held}
    assert all(f"google/{name}" in train for name in names)
    assert not any(key.startswith(f"twitter/{name}") for key in train for name in names)
    for item in items:
        if item.key.startswith("scene/"):
            style, things, _ = scene_of(item)
            shows = style == "twitter" and bool(names & set(things))
            assert shows == (item.kind == "style x concept in a scene") and (item.split == "held" or not shows)


def test_held_out_tones(items):
    """A held-out tone is held out in both styles; other tones of the concept, and that tone of
    others, are not.
    """
    tones = defaultdict(set)
    for item in items:
        if item.key.startswith("google/") and item.key.count("/") == 2:
            _, name, tone = item.key.split("/")
            tones[name, item.split].add(tone)
    held = {(name, tone) for (name, split), those in tones.items() if split == "held" for tone in those}
    assert held and all(tones[name, "train"] for name, _ in held)
    assert all(any(tone in tones[other, "train"] for other, _ in tones) for _, tone in held)
    for item in items:
        if item.key.startswith("twitter/") and item.key.count("/") == 2 and tuple(item.key.split("/")[1:]) in held:
            assert item.split == "held"


def test_held_out_scenes(items):
    """No held-out pair, in whichever order, relation and style, and no held-out count of a thing is
    in training; their parts are; every held-out sample says what it tests and no training sample
    does.
    """
    pairs, counts, alone = {"train": set(), "held": set()}, {"train": set(), "held": set()}, set()
    for item in items:
        assert (item.split == "held") == bool(item.kind) and item.split in ("train", "held")
        if item.key.startswith("scene/"):
            _, names, relation = scene_of(item)
            if item.kind != "style x concept in a scene":
                (pairs if relation else counts)[item.split].add((*sorted(set(names)), len(names)))
                assert item.kind in ("", "pair" if relation else "count")
            alone |= set(names) if item.split == "train" else set()
    for those in (pairs, counts):
        assert those["held"] and those["train"] and not those["held"] & those["train"]
        assert all(name in alone for *names, _ in those["held"] for name in names)
    share_held = len(pairs["held"]) / len(pairs["held"] | pairs["train"])
    assert share_held == pytest.approx(.2, abs=.1)


# ---------------------------------------------------------------- determinism, errors

def test_the_stream_is_a_function_of_the_seed(world, items, tmp_path):
    """Read twice, the same items to the last pixel; another seed moves scenes, but no picture
    alone and no rule.
    """
    again = list(world)
    same = lambda a, b: a[0] == b[0] and a[2:] == b[2:] and (a.picture == b.picture).all()
    assert len(again) == len(items) and all(map(same, again, items))
    archives = write_archives(tmp_path)
    other = list(Emoji(archives, size=16, scenes=100, held=0.2, seed=4))
    assert all(map(same, other[:154], items)) and not all(map(same, other[154:], items[154:254]))
    few = [c.name for c in Emoji(archives, size=16, scenes=0, limit=10).concepts]
    assert len(few) == 10 and few == [c.name for c in Emoji(archives, size=16, scenes=0, limit=20).concepts][:10]


@pytest.mark.parametrize("held, kinds", [(0.0, {"": 154}), (1.0, {"style x concept": 77, "": 77})])
def test_the_share_of_held_out_is_exact_at_its_ends(world, monkeypatch, held, kinds):
    """0 holds nothing out; 1 every rendering in the last style, and no concept altogether."""
    monkeypatch.setattr(world, "held", held)
    assert Counter(item.kind for item in world.singles()) == kinds


def test_errors(tmp_path):
    """A size that has no quarters, archives without emoji, too few things for scenes: one line
    each.
    """
    with pytest.raises(ValueError, match="must be a multiple of 4, got 30"):
        check_size(30)
    with pytest.raises(ValueError, match="no emoji in .*google.*: fetch the packages again"):
        Emoji(write_archives(tmp_path, []), size=16)
    with pytest.raises(ValueError, match="scenes need two things, these 1 emoji have"):
        Emoji(write_archives(tmp_path), size=16, limit=1)
    assert len(list(Emoji(write_archives(tmp_path), size=16, limit=1, scenes=0))) >= 2


SMALL = [entry(0, "FOG", "Travel & Places"), entry(1, "OX", "Animals & Nature"), entry(2, "T-REX", "Animals & Nature"),
         entry(3, "PEAR", "Food & Drink"), entry(4, "KEYCAP 1", "Symbols"), entry(5, "GONE", "Objects")]


@pytest.fixture
def packs(tmp_path, monkeypatch):
    """Replaces npm_pack by small archives that hold more than is used; the list of the styles it
    was called with.
    """
    calls = []
    (tmp_path / "packs").mkdir()
    monkeypatch.setattr(emoji, "npm_pack", lambda style, _: calls.append(style)
                        or write_archives(tmp_path / "packs", SMALL)[style])
    return calls


def contents(folder):
    """{path inside the folder: bytes} of every file."""
    return {path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob("*") if path.is_file()}


def test_things_and_short_names_come_first(tmp_path, packs):
    """Things before signs, then by length; what a style does not draw is left out, and more
    cannot be asked for.
    """
    emoji.fetch_folder(tmp_path / "emoji", 5)
    captions = [caption for _, caption in read_metadata(tmp_path / "emoji")]
    assert captions[::2] == [f"a google emoji of {name}" for name in ("ox", "fog", "pear", "t rex", "keycap 1")]
    with pytest.raises(ValueError, match="5 emoji, not 6"):
        emoji.fetch_folder(tmp_path / "more", 6)


def test_emoji_folder_is_complete(tmp_path, packs):
    """Pictures, captions and credits are written, and nothing else from the archives."""
    folder = tmp_path / "new" / "emoji"
    assert emoji.fetch_folder(folder, count=4) == 8
    files = contents(folder)
    assert set(files) == {"NOTICE", "metadata.jsonl", *(f"{style}/{name}.png" for style in STYLES
                                                        for name in ("ox", "fog", "pear", "t_rex"))}
    with Image.open(folder / "google" / "t_rex.png") as picture:
        assert picture.size == (64, 64) and picture.getpixel((0, 0))[:3] == colour("2.png", "google")
    rows = read_metadata(folder)
    assert [caption for _, caption in rows][:3] == [
        "a google emoji of ox", "a twitter emoji of ox", "a google emoji of fog"]
    assert rows[-1] == (folder / "twitter" / "t_rex.png", "a twitter emoji of t rex")
    notice = files["NOTICE"].decode()
    assert all(word in notice for word in ("Noto", "Apache-2.0", "Twemoji", "CC-BY 4.0", "MIT"))


def test_emoji_captions_are_plain_words(tmp_path, packs):
    """Captions hold lower-case ASCII letters, digits and single spaces only."""
    emoji.fetch_folder(tmp_path / "emoji", count=5)
    for _, caption in read_metadata(tmp_path / "emoji"):
        assert all(word.isascii() and word.isalnum() and word == word.lower() for word in caption.split(" "))


def test_same_call_twice_fetches_once(tmp_path, packs):
    """The second call fetches nothing and changes no file."""
    emoji.fetch_folder(tmp_path / "emoji", count=2)
    before = contents(tmp_path / "emoji")
    assert emoji.fetch_folder(tmp_path / "emoji", count=2) == 4
    assert packs == ["google", "twitter"] and contents(tmp_path / "emoji") == before


def test_call_cut_short_is_done_again(tmp_path, packs, monkeypatch):
    """A call that dies before its last step leaves no metadata, and the next call completes it."""
    with monkeypatch.context() as patch:
        patch.setattr("unimod_mini.atomic_files.os.replace", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            emoji.fetch_folder(tmp_path / "emoji", count=2)
    assert set(contents(tmp_path / "emoji")) >= {"google/ox.png"}
    assert not (tmp_path / "emoji" / "metadata.jsonl").exists()
    assert emoji.fetch_folder(tmp_path / "emoji", count=2) == 4
    assert len(read_metadata(tmp_path / "emoji")) == 4


@pytest.mark.parametrize("what", ["other count", "own data set", "own file"])
def test_other_folders_are_left_alone(tmp_path, packs, what):
    """A folder that holds anything else is refused before anything is fetched, and unchanged."""
    folder = tmp_path / "mine"
    if what == "other count":
        emoji.fetch_folder(folder, count=3)
    else:
        folder.mkdir()
        (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "mine"}\n')
        (folder / "a.png").write_bytes(b"x")
    if what == "own file":
        (folder / "metadata.jsonl").unlink()
    before = contents(folder)
    packs.clear()
    with pytest.raises(FileExistsError, match="mine"):
        emoji.fetch_folder(folder, count=2)
    assert packs == [] and contents(folder) == before


def test_missing_npm_says_what_to_install(tmp_path, monkeypatch):
    """Without npm nothing is written, and the error names Node.js."""
    monkeypatch.setattr(emoji.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="npm is missing.*Node.js"):
        emoji.fetch_folder(tmp_path / "emoji")
    assert not (tmp_path / "emoji").exists()


def test_npm_is_called_with_pinned_packages(tmp_path, monkeypatch):
    """npm packs one exact version into the given folder; a failing npm is an error."""
    seen = []
    monkeypatch.setattr(emoji.shutil, "which", lambda name: sys.executable)
    monkeypatch.setattr(emoji.subprocess, "run", lambda command, **how: seen.append((command, how)))
    path = emoji.npm_pack("google", tmp_path)
    (command, how), = seen
    assert command[1:3] == ["pack", "emoji-datasource-google@16.0.0"]
    assert how["cwd"] == tmp_path and path == tmp_path / "emoji-datasource-google-16.0.0.tgz"
    monkeypatch.undo()
    monkeypatch.setattr(emoji.shutil, "which", lambda name: sys.executable)  # "python pack" fails
    with pytest.raises(subprocess.CalledProcessError):
        emoji.npm_pack("google", tmp_path)


def test_command_line(tmp_path, packs, capsys):
    """FOLDER --count N says what it wrote and which command comes next."""
    folder = tmp_path / "emoji"
    emoji.main([str(folder), "--count", "2"])
    out = capsys.readouterr().out
    assert "4 pictures of 2 emoji" in out and f"python train_toy.py --images {folder}" in out
    for arguments, message in ((["--count", "0"], "error: --count must be at least 1, got 0"), (["--count", "1"], "error: .* holds other things")):
        with pytest.raises(SystemExit, match=message):
            emoji.main([str(folder), *arguments])


def test_written_emoji_load(tmp_path, packs):
    """What is written is what load_image_folder reads."""
    emoji.fetch_folder(tmp_path / "emoji", count=2)
    images, captions = load_image_folder(tmp_path / "emoji", size=16)
    assert images.shape == (4, 16, 16, 3) and len(captions) == 4
    assert images[1, 0, 0].tolist() == list(colour("1.png", "twitter"))

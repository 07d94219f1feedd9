"""What people write to the toy world: turned into the world's own words, understood, and judged.

`tidy` comes first: "2 red rings, a Blue disc." -> "two red rings and a blue disc". All other
functions take tidy texts. They read every caption and question of the world's grammar, also
"two rings and a blue disc top", which the world itself never samples.
"""

import re
from dataclasses import replace
from difflib import get_close_matches
from itertools import pairwise, product
from random import Random

from .shapes import NUMBERS, Prompt, Thing, World, caption, is_as_asked, phrase, plural

QUESTION_WORDS = ("what", "where", "is", "how", "describe")
MARKS = str.maketrans({",": " and ", ".": " ", "!": " ", "?": " "})
SPELLINGS = {"an": "a", "centre": "center", "colour": "color"}
SPELLINGS |= {str(n): word for n, word in enumerate(NUMBERS)}


def tidy(world: World, text: str) -> str:
    """The text in the world's own words. ValueError for an empty text and for an unknown word."""
    words = ["and"]  # so that no "and" begins the text
    for word in text.lower().translate(MARKS).split():
        if word != "and" or words[-1] != "and":
            words.append(SPELLINGS.get(word, word))
    line = " ".join(words[1:]).removesuffix(" and")
    line = re.sub(r"(?<!\S)one (?=\w)", "a ", line)  # alone it is an answer
    line = re.sub(r"(?<!\S)(top|bottom) (left|right)(?!\S)", r"\1-\2", line)
    if not line:
        raise ValueError("an empty text: write {!r}, or ask {!r}".format(*example(world)))
    for before, word in pairwise([None, *line.split()]):
        if word not in world.words:
            raise ValueError(f"unknown word {word!r} {what_fits(world, before, word)}")
    asks = "?" in text or line.split()[0] in QUESTION_WORDS
    return f"{line} ?" if asks else line


def what_fits(world: World, before: str | None, word: str) -> str:
    """What to write in place of an unknown word behind `before` (None: at the beginning).

    Read off samples of the same world with nothing held out: people may name those pairs, too.
    """
    world, rng = replace(world, n_held_out=0), Random(0)
    prompts, _ = world.sample_t2i(8000, rng)
    questions, _ = world.sample_mmu(2000, rng)
    found = set()
    for made in prompts + questions:
        pairs = pairwise([None, *made.text.split()])
        found |= {after for first, after in pairs if first == before and after != "?"}
    fit = [known for known in world.words if known in found]
    where = f"behind {before!r}" if before else "at the beginning"
    for near in get_close_matches(word, fit, n=1):
        where += f" (did you mean {near!r}?)"
    if not fit:
        return f"{where}: leave it out, nothing fits"
    return f"{where}: write one of the {by_kind(world, fit)}"


def by_kind(world: World, words: list) -> str:
    """["and", "red", "ring", "disc"] -> "colors red; shapes ring, disc; words and"."""
    shapes = [*world.shapes, *map(plural, world.shapes)]
    groups = []
    for kind, members in (("colors", world.colors), ("shapes", shapes), ("places", world.places),
                          ("numbers", NUMBERS), ("words", world.words)):
        if group := [word for word in words if word in members]:
            groups.append(f"{kind} {', '.join(group)}")
        words = [word for word in words if word not in members]
    return "; ".join(groups)


def example(world: World) -> tuple[str, str]:
    """A caption and a question about pairs that training shows."""
    pairs = (world.seen[-1], world.seen[0])[:world.max_objects]
    text = caption([Thing(color, shape, None) for color, shape in pairs])
    return text, f"is there a {' '.join(world.seen[0])} ?"


def names(world: World) -> tuple[dict, dict]:
    """{"red ring top": Thing, ..} for one object, {"red rings": Thing, ..} for several."""
    one, many = {}, {}
    for color, shape in product((None, *world.colors), world.shapes):
        several = phrase(Thing(color, plural(shape), None)).removeprefix("a ")
        many[several] = Thing(color, shape, None)
        for place in (None, *world.places):
            thing = Thing(color, shape, place)
            one[phrase(thing).removeprefix("a ")] = thing
    return one, many


def read_prompt(world: World, text: str) -> Prompt | None:
    """What a caption asks for, as World.fits takes it; None if it is no caption of this world.

    "two rings and a blue disc top" asks for Thing(None, "ring", None) twice and for
    Thing("blue", "disc", "top").
    """
    one, many = names(world)
    things = []
    for part in text.split(" and "):
        number, _, name = part.partition(" ")
        if number == "a" and name in one:
            things.append(one[name])
        elif number in NUMBERS[2:world.max_objects + 1] and name in many:
            things += [many[name]] * NUMBERS.index(number)
        else:
            return None
    return Prompt(text, "given", tuple(things))


def answer(world: World, text: str, things: list) -> str | None:
    """The right answer to a question on a scene; None if there is none, or more than one."""
    one, many = names(world)
    right = []

    def found(asked: Thing) -> list:
        return [thing for thing in things if is_as_asked(thing, asked)]

    match text.split():
        case ["describe", "?"] if things:
            right = [caption(things)]
        case ["how", "many", "objects", "?"]:
            right = [NUMBERS[len(things)]]
        case ["how", "many", *name, "?"] if asked := many.get(" ".join(name)):
            right = [NUMBERS[len(found(asked))]]
        case ["what", "color" | "shape" as kind, "is", place, "?"]:
            right = [getattr(thing, kind) for thing in things if thing.place == place]
        case ["what", "color", "is", "the", *name, "?"] if asked := one.get(" ".join(name)):
            right = [thing.color for thing in found(asked)]
        case ["where", "is", "the", *name, "?"] if asked := one.get(" ".join(name)):
            right = [thing.place for thing in found(asked)]
        case ["is", "there", "a", *name, "?"] if asked := one.get(" ".join(name)):
            right = [thing.place for thing in found(asked)] or ["no"]
    return right[0] if len(right) == 1 else None


def held_out(world: World, text: str) -> tuple:
    """The (colour, shape) pairs of the text that training never shows."""
    return tuple(pair for pair in world.held_out if " ".join(pair) in text)

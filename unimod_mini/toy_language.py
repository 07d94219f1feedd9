"""What people write to the toy world: made its own words, read, and judged.

`tidy` comes first: "2 red rings, a Blue disc." -> "two red rings and a blue disc". The others take
tidy texts. Departure from the world's sampler: every caption and question of its grammar is read,
also "two rings and a blue disc top", which it never makes.
"""

import re
from dataclasses import replace
from difflib import get_close_matches
from itertools import product
from random import Random

from .shapes import NUMBERS, Prompt, Thing, World, assignable, phrase, plural

ASKING = ("what", "where", "is", "how", "describe")        # how a question begins
MARKS = str.maketrans({",": " and ", ".": " ", "!": " ", "?": " "})
SPELLINGS = {"an": "a", "centre": "center", "colour": "color"}
SPELLINGS |= {str(n): word for n, word in enumerate(NUMBERS)}


def tidy(world: World, text: str) -> str:
    """The text in the world's own words. ValueError for an empty text and for an unknown word."""
    words = ["and"]                                        # no other may begin or follow it
    for word in text.lower().translate(MARKS).split():
        if word != "and" or words[-1] != "and":
            words.append(SPELLINGS.get(word, word))
    line = " ".join(words[1:]).removesuffix(" and")
    line = re.sub(r"(?<!\S)one (?=\w)", "a ", line)        # alone it is an answer
    line = re.sub(r"(?<!\S)(top|bottom) (left|right)(?!\S)", r"\1-\2", line)
    if not line:
        raise ValueError("an empty text: write {!r}, or ask {!r}".format(*example(world)))
    check_words(world, line.split())
    return f"{line} ?" if "?" in text or line.split()[0] in ASKING else line


def check_words(world: World, words: list) -> None:
    """ValueError for the first word that is not the world's: it says what fits in its place."""
    for before, word in zip([None, *words], words):
        if word in world.words:
            continue
        fit = followers(world, before)
        where = f"behind {before!r}" if before else "at the beginning"
        for near in get_close_matches(word, fit, n=1):
            where += f" (did you mean {near!r}?)"
        advice = f"write one of the {by_kind(world, fit)}" if fit else "leave it out, nothing fits"
        raise ValueError(f"unknown word {word!r} {where}: {advice}")


def followers(world: World, before: str | None) -> set:
    """The words that come behind `before` (None: that begin) in the world's own texts, without "?".

    Read off samples of the same world with nothing held out: people may name those pairs too.
    """
    world, rng = replace(world, n_held_out=0), Random(0)
    prompts, _ = world.sample_t2i(8000, rng)
    questions, _ = world.sample_mmu(2000, rng)
    found = set()
    for made in prompts + questions:
        words = made.text.split()
        found |= {word for last, word in zip([None, *words], words) if last == before}
    return found - {"?"}


def by_kind(world: World, words: set) -> str:
    """{"ring", "red", "and", "disc"} -> "colors red; shapes ring, disc; words and"."""
    shapes = [*world.shapes, *map(plural, world.shapes)]
    kinds = {"colors": world.colors, "shapes": shapes, "places": world.places, "numbers": NUMBERS,
             "words": world.words}
    left = [word for word in world.words if word in words]
    groups = []
    for kind, members in kinds.items():                    # the last takes what is left
        if group := [word for word in left if word in members]:
            groups.append(f"{kind} {', '.join(group)}")
        left = [word for word in left if word not in members]
    return "; ".join(groups)


def example(world: World) -> tuple[str, str]:
    """A caption and a question of pairs that training shows."""
    pairs = (world.seen[-1], world.seen[0])[:world.max_objects]
    text = caption([Thing(color, shape, None) for color, shape in pairs])
    return text, f"is there a {' '.join(world.seen[0])} ?"


# -------------------------------------------------------------------------------- what is right

def caption(things: list) -> str:
    """The things as a caption lists them."""
    return " and ".join(phrase(thing) for thing in things) or "no objects"


def names(world: World) -> tuple[dict, dict]:
    """What texts call one thing, {"red ring top": ..}, and several, {"red rings": ..}: Things."""
    one, many = {}, {}
    for color, shape in product((None, *world.colors), world.shapes):
        several = phrase(Thing(color, plural(shape), None)).removeprefix("a ")
        many[several] = Thing(color, shape, None)
        for place in (None, *world.places):
            thing = Thing(color, shape, place)
            one[phrase(thing).removeprefix("a ")] = thing
    return one, many


def read_prompt(world: World, text: str) -> Prompt | None:
    """What a caption asks for, as World.fits takes it. None: it is no caption of this world.

    "two rings and a blue disc top": Thing(None, "ring", None) twice, Thing("blue", "disc", "top").
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
    """The right answer to a question on a scene. None: there is none, or more than one."""
    one, many = names(world)
    right = []
    match text.split():
        case ["describe", "?"] if things:
            right = [caption(things)]
        case ["how", "many", "objects", "?"]:
            right = [NUMBERS[len(things)]]
        case ["how", "many", *name, "?"] if asked := many.get(" ".join(name)):
            right = [NUMBERS[len(shown(things, asked))]]
        case ["what", "color" | "shape" as kind, "is", place, "?"]:
            right = [getattr(thing, kind) for thing in things if thing.place == place]
        case ["what", "color", "is", "the", *name, "?"] if asked := one.get(" ".join(name)):
            right = [thing.color for thing in shown(things, asked)]
        case ["where", "is", "the", *name, "?"] if asked := one.get(" ".join(name)):
            right = [thing.place for thing in shown(things, asked)]
        case ["is", "there", "a", *name, "?"] if asked := one.get(" ".join(name)):
            right = [thing.place for thing in shown(things, asked)] or ["no"]
    return right[0] if len(right) == 1 else None


def shown(things: list, asked: Thing) -> list:
    """The things that are as asked."""
    return [thing for thing in things if assignable((asked,), [thing])]


def held_out(world: World, text: str) -> tuple:
    """The (colour, shape) pairs named in the text that training never shows, "red rings" too."""
    return tuple(pair for pair in world.held_out if " ".join(pair) in text)

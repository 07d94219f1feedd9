"""The toy world: pictures of coloured shapes, captions, questions, and exact checkers.

A picture is a grid of places (2 x 2 by default). A place holds at most one object, 4 x 4 pixels
large, in a light or a dark shade of its colour: a caption with three objects has eight right
drawings. With `margin` 1 an object also moves within its place. The image tokenizer's patches are
2 x 2 pixels, so a picture is 16 tokens by default. Rings and discs are made of the same four
patches, arranged differently, and so are crosses and diamonds: no single token gives a shape away.

Captions name objects in reading order, the order in which Emu3 draws; a drawing may show them in
any order. A drawing is read back place by place, and questions are asked only if they have exactly
one right answer, so everything is checked exactly. Some colour-shape pairs never occur in
training: drawing them tests composition. Prompt categories follow GenEval (arXiv 2310.11513).

Legend: B pictures, P places, h and w rows and columns of patches.
"""

from collections import Counter
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

COLORS = {"red": (230, 60, 60), "green": (70, 190, 90), "blue": (70, 120, 240),
          "yellow": (240, 210, 70), "purple": (170, 90, 220), "cyan": (80, 215, 225),
          "orange": (245, 150, 50), "white": (240, 240, 240)}
BACKGROUND = (24, 24, 32)
SHADES = (1.0, 0.55)  # factors on the colour
SHAPES = {"ring": "####,#..#,#..#,####", "disc": ".##.,####,####,.##.",
          "cross": "#..#,.##.,.##.,#..#", "diamond": ".##.,#..#,#..#,.##.",
          "square": "####,####,####,####", "bars": "#.#.,#.#.,#.#.,#.#."}
PATCH, OBJECT = 2, 4  # side in pixels of a token and of an object
PLACES = {2: ("top-left", "top-right", "bottom-left", "bottom-right"),
          3: ("top-left", "top", "top-right", "left", "center", "right",
              "bottom-left", "bottom", "bottom-right")}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
T2I_CATEGORIES = ("one_object", "two_objects", "counting", "colors", "place", "binding", "scene")
MMU_CATEGORIES = ("color", "shape", "place", "count", "existence", "caption")
# Training draws more often what is learnt slowly, and asks more often for captions, which say most
# about a picture. No question of a dialogue gives away the answer to a later one.
DRAWN = (*T2I_CATEGORIES, "binding", "binding", "scene")
DIALOGUES = (("existence", "count"), ("count", "color"), ("caption",), ("place", "count"),
             ("existence", "count"), ("color", "place"), ("caption",), ("existence", "count"),
             ("count", "place"), ("shape", "color"), ("existence", "count"), ("caption",))


class Thing(NamedTuple):
    """An object of a scene, or of a prompt, where None means "any"."""
    color: str | None
    shape: str | None
    place: str | None


class Prompt(NamedTuple):
    text: str
    category: str
    things: tuple  # what the picture must show, and nothing else


class Question(NamedTuple):
    text: str
    category: str
    answer: str


@dataclass
class World:
    """A toy world; ValueError for a setting outside its limits."""
    side: int = 2            # places down and across
    max_objects: int = 3
    n_colors: int = 6
    n_shapes: int = 4
    margin: int = 0          # patches by which a place is wider than its object
    n_held_out: int = 3      # colour-shape pairs that training never shows

    def __post_init__(self):
        limits = {"side": (2, 3), "max_objects": (1, self.side**2), "margin": (0, 1),
                  "n_colors": (2, len(COLORS)), "n_shapes": (2, len(SHAPES)),
                  "n_held_out": (0, min(self.n_colors, self.n_shapes) - 1)}
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"World: {name} must lie in [{low}, {high}], got {value}")
        self.places = PLACES[self.side]
        self.colors = tuple(COLORS)[:self.n_colors]
        self.shapes = tuple(SHAPES)[:self.n_shapes]
        self.pairs = [(color, shape) for color in self.colors for shape in self.shapes]
        self.held_out = tuple(zip(self.colors, self.shapes))[:self.n_held_out]
        self.seen = tuple(pair for pair in self.pairs if pair not in self.held_out)
        self.words = self.vocabulary()
        self.longest_text = max(7, 2 + 5 * self.max_objects - 1)   # words of question and answer
        self.cell = OBJECT // PATCH + self.margin                  # patches across a place
        self.grid = self.side * self.cell, self.side * self.cell   # (h, w)
        moves = [PATCH * i for i in range(self.margin + 1)]
        self.ways = [(shade, y, x) for shade in SHADES for y in moves for x in moves]
        self.patches, self.cells = self.draw_cells()

    def vocabulary(self) -> list:
        """Every word of the captions, questions and answers."""
        grammar = "a and what color shape is the where how many there describe ? no objects"
        numbers, plurals = NUMBERS[:self.max_objects + 1], map(plural, self.shapes)
        words = [*grammar.split(), *self.colors, *self.shapes, *plurals, *numbers, *self.places]
        return list(dict.fromkeys(words))

    # --- Drawing and reading ---

    def draw_cells(self) -> tuple[np.ndarray, Tensor]:
        """The distinct patches (n, 2, 2, 3) uint8, patch 0 the background; the codes of a place
        (kinds, ways, cell, cell) long, kind 0 empty, kind k the k-th pair."""
        n, side, shape = self.cell, self.cell * PATCH, (1 + len(self.pairs), len(self.ways))
        pixels = np.full((*shape, side, side, 3), BACKGROUND, dtype=np.uint8)
        for kind, (color, name) in enumerate(self.pairs, start=1):
            glyph = np.array([list(row) for row in SHAPES[name].split(",")]) == "#"
            for way, (shade, y, x) in enumerate(self.ways):
                area = pixels[kind, way, y:y + OBJECT, x:x + OBJECT]
                area[glyph] = np.array(COLORS[color]) * shade
        patches = pixels.reshape(-1, n, PATCH, n, PATCH, 3).swapaxes(2, 3)
        patches = patches.reshape(-1, PATCH * PATCH * 3)
        unique, first, code = np.unique(patches, axis=0, return_index=True, return_inverse=True)
        order = first.argsort()  # codes in order of appearance
        codes = order.argsort()[code.reshape(-1)].reshape(*shape, n, n)
        return unique[order].reshape(-1, PATCH, PATCH, 3), torch.from_numpy(codes)

    def draw(self, scenes: list, rng: Random) -> Tensor:
        """Scenes (lists of Thing) -> codes (B, h, w) long; every object in one of its ways."""
        n, side = self.cell, self.side
        kind = torch.zeros(len(scenes), len(self.places), dtype=torch.long)  # (B, P)
        for row, things in enumerate(scenes):
            for thing in things:
                pair = thing.color, thing.shape
                kind[row, self.places.index(thing.place)] = 1 + self.pairs.index(pair)
        ways = [rng.randrange(len(self.ways)) for _ in range(kind.numel())]
        way = torch.tensor(ways, dtype=torch.long).view_as(kind)  # (B, P)
        cells = self.cells[kind, way].view(-1, side, side, n, n)
        return cells.transpose(2, 3).reshape(-1, side * n, side * n)  # (B, h, w)

    def read(self, codes: Tensor) -> list:
        """Codes (B, h, w) -> the scene of every picture, None if a place shows no exact object."""
        n, side = self.cell, self.side
        cells = codes.cpu().reshape(-1, side, n, side, n).transpose(2, 3)
        cells = cells.reshape(-1, side * side, 1, n * n)
        match = (cells == self.cells.reshape(-1, n * n)).all(-1)  # (B, P, kinds ways)
        kinds = match.long().argmax(-1) // len(self.ways)
        kinds = torch.where(match.any(-1), kinds, -1)  # (B, P)
        scenes = []
        for row in kinds.tolist():
            things = [Thing(*self.pairs[kind - 1], place)
                      for kind, place in zip(row, self.places) if kind > 0]
            scenes.append(None if -1 in row else things)
        return scenes

    # --- Scenes and prompts ---

    def scene(self, rng: Random, held_out: bool = False, count=None, pairs=None) -> list:
        """`count` Things, or those of `pairs`, at random places, in reading order.

        held_out: one of them is a held-out pair; ValueError if the world has none.
        """
        if held_out and not self.held_out:
            raise ValueError("this world has no held-out pairs: set n_held_out above 0 or sample "
                             "with held_out=False")
        if pairs is None:
            count = count or rng.randint(1, self.max_objects)
            pairs = [rng.choice(self.seen) for _ in range(count)]
        if held_out:
            pairs[rng.randrange(len(pairs))] = rng.choice(self.held_out)
        places = rng.sample(range(len(self.places)), len(pairs))
        return [Thing(*pair, self.places[place]) for place, pair in sorted(zip(places, pairs))]

    def alike(self, rng: Random) -> list:
        """A scene of one shape in different colours: the shape alone does not answer "where"."""
        shape, most = rng.choice(self.shapes), self.max_objects
        pairs = [pair for pair in self.seen if pair[1] == shape]
        pairs = rng.sample(pairs, min(rng.randint(min(2, most), most), len(pairs)))
        return self.scene(rng, pairs=pairs)

    def prompt(self, category: str, rng: Random, held_out: bool = False) -> tuple[Prompt, list]:
        """A prompt of this category and a scene that it describes."""
        two = min(2, self.max_objects)
        several, any_number = rng.randint(two, self.max_objects), rng.randint(1, self.max_objects)
        counts = {"two_objects": two, "binding": two, "counting": several, "scene": any_number}
        count = counts.get(category, 1)
        things = self.scene(rng, held_out, count)
        if category == "counting":  # one pair, several times; a held-out one if there is any
            first = max(things, key=lambda thing: thing[:2] in self.held_out)
            things = [first._replace(place=thing.place) for thing in things]
        unnamed = {}
        if category in ("one_object", "two_objects"):
            unnamed["color"] = None
        if category not in ("place", "scene"):
            unnamed["place"] = None
        asked = [thing._replace(**unnamed) for thing in things]
        text = caption(asked)
        if category == "counting" and count > 1:
            text = f"{NUMBERS[count]} {things[0].color} {plural(things[0].shape)}"
        return Prompt(text, category, tuple(asked)), things

    def sample_t2i(self, n: int, rng: Random, held_out: bool = False, categories=T2I_CATEGORIES):
        """n prompts, categories in turn, and the codes (n, h, w) of a right picture for each."""
        prompts, scenes = [], []
        for i in range(n):
            prompt, scene = self.prompt(categories[i % len(categories)], rng, held_out)
            prompts.append(prompt)
            scenes.append(scene)
        return prompts, self.draw(scenes, rng)

    def sample_prompts(self, n: int, rng: Random):
        """n prompts to train on, and their pictures."""
        return self.sample_t2i(n, rng, categories=DRAWN)

    def fits(self, prompt: Prompt, things: list | None) -> bool:
        """Does a picture that was read as `things` show exactly what the prompt asks for?"""
        if things is None or len(things) != len(prompt.things):
            return False
        return assignable(prompt.things, things)

    # --- Questions ---

    def question(self, category: str, things: list, rng: Random) -> Question:
        """A question on this scene with exactly one right answer.

        A "caption" where the category has none: all objects have twins, or no pair is absent.
        """
        counts = Counter(thing[:2] for thing in things)
        unique = [thing for thing in things if counts[thing[:2]] == 1]
        about_one = category in ("place", "existence") and unique
        target = rng.choice(unique if about_one else things)
        if category == "color":
            shapes = [thing.shape for thing in things]
            which = f"the {target.shape}" if shapes.count(target.shape) == 1 else target.place
            return Question(f"what color is {which} ?", category, target.color)
        if category == "shape":
            return Question(f"what shape is {target.place} ?", category, target.shape)
        if category == "place" and unique:
            text = f"where is the {target.color} {target.shape} ?"
            return Question(text, category, target.place)
        if category == "count":
            shape = rng.choice([target.shape, rng.choice(self.shapes), None])
            if shape is None:
                return Question("how many objects ?", category, NUMBERS[len(things)])
            count = [thing.shape for thing in things].count(shape)
            return Question(f"how many {plural(shape)} ?", category, NUMBERS[count])
        if category == "existence":  # "yes" is a place, so this is learnt with "where is .."
            absent = [pair for pair in self.seen if pair not in counts]
            here = unique and (not absent or rng.random() < 0.5)
            if here or absent:
                color, shape = target[:2] if here else rng.choice(absent)
                text = f"is there a {color} {shape} ?"
                return Question(text, category, target.place if here else "no")
        return Question("describe ?", "caption", caption(things))

    def sample_mmu(self, n: int, rng: Random, held_out: bool = False, categories=MMU_CATEGORIES):
        """n questions, categories in turn, and the codes (n, h, w) of a picture for each."""
        scenes = [self.scene(rng, held_out) for _ in range(n)]
        questions = [self.question(categories[i % len(categories)], scene, rng)
                     for i, scene in enumerate(scenes)]
        return questions, self.draw(scenes, rng)

    def sample_dialogues(self, n: int, rng: Random, budget: int):
        """n lists of Questions to train on, DIALOGUES in turn, and their pictures (n, h, w).

        `budget`: tokens a dialogue, two marks a turn included; what does not fit is left out, but
        never the first turn. Nothing follows a caption, which would give the answer away.
        """
        scenes, dialogues = [], []
        for i in range(n):
            asks_for_one = {"existence", "place"} & set(DIALOGUES[i % len(DIALOGUES)])
            sample = self.alike if asks_for_one and rng.random() < 0.5 else self.scene
            scenes.append(sample(rng))
        for i, scene in enumerate(scenes):
            turns, left = [], budget
            for category in DIALOGUES[i % len(DIALOGUES)]:
                turn = self.question(category, scene, rng)
                size = len(turn.text.split()) + len(turn.answer.split()) + 2
                if not turns or (size <= left and turns[-1].category != "caption"):
                    turns.append(turn)
                    left -= size
            dialogues.append(turns)
        return dialogues, self.draw(scenes, rng)


def is_as_asked(thing: Thing, asked: Thing) -> bool:
    return all(want in (None, have) for want, have in zip(asked, thing))


def assignable(asked: tuple, things: list) -> bool:
    """Can every asked Thing get one of `things` for itself?"""
    if not asked:
        return True
    for i, thing in enumerate(things):
        others = things[:i] + things[i + 1:]
        if is_as_asked(thing, asked[0]) and assignable(asked[1:], others):
            return True
    return False


def plural(shape: str) -> str:
    return {"cross": "crosses", "bars": "bars"}.get(shape, shape + "s")


def phrase(thing: Thing) -> str:
    """"a red ring top-left", without what is None."""
    return " ".join(["a", *filter(None, thing)])


def caption(things: list) -> str:
    """The things as a caption lists them."""
    return " and ".join(map(phrase, things)) or "no objects"


def commonest_answers(pairs) -> dict:
    """(question, answer) pairs -> {question: its most frequent answer}."""
    counts = {}
    for text, answer in pairs:
        counts.setdefault(text, Counter())[answer] += 1
    return {text: answers.most_common(1)[0][0] for text, answers in counts.items()}


def blind_answers(world: World, n: int = 4000, seed: int = 0) -> dict:
    """The best answer to a question without the picture: the commonest among n samples."""
    questions, _ = world.sample_mmu(n, Random(f"blind {seed}"))
    return commonest_answers((q.text, q.answer) for q in questions)

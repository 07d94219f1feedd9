"""The toy world: pictures of coloured shapes in named places, captions, questions, and exact
checkers.

A picture is a grid of places (2 x 2 by default), a place holds at most one object, 4 x 4 pixels
large, in a light or a dark shade of its colour (so a caption with three objects has eight right
drawings). With `margin` 1 an object also moves within its place. The image tokenizer's patches are
2 x 2 pixels: 16 tokens a picture by default. Rings and discs are made of the same four patches,
arranged differently, and so are crosses and diamonds: no token alone gives a shape away.

Captions name objects in reading order, as a picture is read (Emu3 draws in that order; in any
other, a caption without places says little about which of its colours comes first). Any order in a
drawing is right.

Everything is checked exactly: a generated picture is read back place by place, and an answer is
right or wrong. Some colour-shape pairs are held out of training altogether (`composition`). The
prompt categories follow GenEval (arXiv 2310.11513). Questions are only asked when they have exactly
one right answer ("is there a red ring ?": no, or where it is).

Legend: B batch, P places, h and w patches down and across.
"""

from collections import Counter
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

COLORS = {"red": (230, 60, 60), "green": (70, 190, 90), "blue": (70, 120, 240), "yellow": (240, 210, 70),
          "purple": (170, 90, 220), "cyan": (80, 215, 225), "orange": (245, 150, 50), "white": (240, 240, 240)}
BACKGROUND = (24, 24, 32)
SHAPES = {"ring": "####,#..#,#..#,####", "disc": ".##.,####,####,.##.", "cross": "#..#,.##.,.##.,#..#",
          "diamond": ".##.,#..#,#..#,.##.", "square": "####,####,####,####", "bars": "#.#.,#.#.,#.#.,#.#."}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PLACES = {2: ("top-left", "top-right", "bottom-left", "bottom-right"),
          3: ("top-left", "top", "top-right", "left", "center", "right", "bottom-left", "bottom", "bottom-right")}
T2I_CATEGORIES = ("one_object", "two_objects", "counting", "colors", "place", "binding", "scene")
MMU_CATEGORIES = ("color", "shape", "place", "count", "existence", "caption")
# What training draws and asks: the slowest to learn more often, and captions, which say most about
# a picture. No
# question gives a later one of its dialogue away ("where is the red ring ?" would say that there is
# one).
DRAWN = (*T2I_CATEGORIES, "binding", "binding", "scene")
DIALOGUES = (("existence", "count"), ("count", "color"), ("caption",), ("place", "count"), ("existence", "count"),
             ("color", "place"), ("caption",), ("existence", "count"), ("count", "place"), ("shape", "color"),
             ("existence", "count"), ("caption",))
PATCH, OBJECT = 2, 4             # pixels: of a token, of an object
SHADES = (1.0, 0.55)             # factors on the colour


class Thing(NamedTuple):
    """An object of a scene or of a prompt; None in a prompt means "any"."""
    color: str | None
    shape: str | None
    place: str | None


class Prompt(NamedTuple):
    text: str
    category: str
    things: tuple      # what the picture must show, and nothing else


class Question(NamedTuple):
    text: str
    category: str
    answer: str


@dataclass(frozen=True)
class World:
    """Settings of a world. Raises ValueError when a setting leaves nothing to draw."""
    side: int = 2            # places down and across: 2 or 3
    max_objects: int = 3
    n_colors: int = 6
    n_shapes: int = 4
    # 1: a place is one patch wider than its object, which then has four positions in it
    margin: int = 0
    n_held_out: int = 3      # colour-shape pairs that training never shows

    def __post_init__(self):
        if self.side not in PLACES or not 1 <= self.max_objects <= self.side**2:
            raise ValueError(f"World: side must be 2 or 3 and max_objects in [1, side^2], got {self.side}, "
                             f"{self.max_objects}")
        if not (2 <= self.n_colors <= len(COLORS) and 2 <= self.n_shapes <= len(SHAPES)):
            raise ValueError(f"World: 2 to {len(COLORS)} colours and 2 to {len(SHAPES)} shapes, got {self.n_colors}, "
                             f"{self.n_shapes}")
        if self.margin not in (0, 1):
            raise ValueError(f"World: margin must be 0 or 1, got {self.margin}")
        if not 0 <= self.n_held_out <= min(self.n_colors, self.n_shapes) - 1:
            raise ValueError(f"World: n_held_out must leave every colour and shape in training, got {self.n_held_out}")
        pairs = [(c, s) for c in self.colors for s in self.shapes]
        # the diagonal: each colour, shape once
        held = tuple(zip(self.colors, self.shapes))[:self.n_held_out]
        derived = {"pairs": pairs, "held_out": held, "seen": tuple(p for p in pairs if p not in held)}
        derived["patches"], derived["cells"] = self.draw_cells(pairs)
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    @property
    def colors(self) -> tuple:
        return tuple(COLORS)[:self.n_colors]

    @property
    def shapes(self) -> tuple:
        return tuple(SHAPES)[:self.n_shapes]

    @property
    def places(self) -> tuple:
        return PLACES[self.side]

    @property
    def cell(self) -> int:
        """Patches across a place."""
        return OBJECT // PATCH + self.margin

    @property
    def ways(self) -> list:
        """(shade, pixels down, pixels right): all ways to draw one object."""
        moves = [PATCH * i for i in range(self.margin + 1)]
        return [(shade, y, x) for shade in SHADES for y in moves for x in moves]

    @property
    def grid(self) -> tuple:
        return (self.side * self.cell,) * 2

    @property
    def longest_text(self) -> int:
        """Words of the longest question with its answer: "describe ?" and every object, or "what
        color is the ..".
        """
        return max(7, 2 + 5 * self.max_objects - 1)

    @property
    def words(self) -> list:
        """Every word of the captions, questions and answers."""
        grammar = ("a and what color shape is the where how many there describe ? no objects").split()
        plurals = [plural(shape) for shape in self.shapes]
        numbers = NUMBERS[:self.max_objects + 1]
        return list(dict.fromkeys([*grammar, *self.colors, *self.shapes, *plurals, *numbers, *self.places]))


    def draw_cells(self, pairs) -> tuple[np.ndarray, Tensor]:
        """The distinct patches (n, 2, 2, 3) uint8, patch 0 the background, and codes (1 + pairs,
        ways, cell, cell).
        """
        n, side = self.cell, self.cell * PATCH
        pixels = np.full((1 + len(pairs), len(self.ways), side, side, 3), BACKGROUND, dtype=np.uint8)
        for number, (color, shape) in enumerate(pairs, start=1):
            glyph = np.array([[c == "#" for c in row] for row in SHAPES[shape].split(",")])
            for way, (shade, y, x) in enumerate(self.ways):
                pixels[number, way, y:y + OBJECT, x:x + OBJECT][glyph] = np.array(COLORS[color]) * shade
        patches = pixels.reshape(-1, n, PATCH, n, PATCH, 3).swapaxes(2, 3).reshape(-1, PATCH * PATCH * 3)
        unique, first, code = np.unique(patches, axis=0, return_index=True, return_inverse=True)
        order = first.argsort()  # by first appearance: the background is code 0
        codes = order.argsort()[code.reshape(-1)].reshape(1 + len(pairs), len(self.ways), n, n)
        return unique[order].reshape(-1, PATCH, PATCH, 3), torch.from_numpy(codes)

    def draw(self, scenes: list, rng: Random) -> Tensor:
        """Scenes (lists of Thing) -> patch codes (B, h, w) long, every object in a random one of
        its ways.
        """
        kind = torch.zeros(len(scenes), len(self.places), dtype=torch.long)
        for row, things in enumerate(scenes):
            for thing in things:
                kind[row, self.places.index(thing.place)] = 1 + self.pairs.index((thing.color, thing.shape))
        way = torch.tensor([[rng.randrange(len(self.ways)) for _ in self.places] for _ in scenes], dtype=torch.long)
        cells = self.cells[kind, way.view(kind.shape)]  # (B, P, cell, cell)
        n, side = self.cell, self.side  # (B, side, side, cell, cell) -> (B, h, w)
        return cells.view(-1, side, side, n, n).transpose(2, 3).reshape(-1, side * n, side * n)

    def read(self, codes: Tensor) -> list:
        """Patch codes (B, h, w) -> for every picture its list of Thing, or None when a place
        shows no exact object.
        """
        n, side = self.cell, self.side
        cells = codes.cpu().reshape(-1, side, n, side, n).transpose(2, 3).reshape(-1, side * side, 1, n * n)
        known = self.cells.reshape(1, 1, -1, n * n)  # (1, 1, kinds x ways, cell^2)
        match = (cells == known).all(-1)                                     # (B, P, kinds x ways)
        kind = torch.where(match.any(-1), match.long().argmax(-1) // len(self.ways), -1).tolist()
        return [None if -1 in row else [Thing(*self.pairs[k - 1], place) for k, place in zip(row, self.places) if k]
                for row in kind]


    def scene(self, rng: Random, held_out: bool = False, count: int | None = None, pairs=None) -> list:
        """Things at distinct places, in reading order.

        held_out: at least one of them is a held-out pair.
        """
        if held_out and not self.held_out:
            raise ValueError("this world has no held-out pairs: set n_held_out above 0 or sample with held_out=False")
        count = rng.randint(1, self.max_objects) if count is None else count
        pairs = [rng.choice(self.seen) for _ in range(count)] if pairs is None else list(pairs)
        if held_out:
            pairs[rng.randrange(count)] = rng.choice(self.held_out)
        places = rng.sample(range(len(self.places)), count)
        return [Thing(*pair, self.places[place]) for place, pair in sorted(zip(places, pairs))]

    def alike(self, rng: Random) -> list:
        """A scene of one shape in different colours: "where is the red ring ?" cannot be
        answered by the shape.
        """
        shape, most = rng.choice(self.shapes), self.max_objects
        pairs = [pair for pair in self.seen if pair[1] == shape]
        pairs = rng.sample(pairs, min(rng.randint(min(2, most), most), len(pairs)))
        return self.scene(rng, count=len(pairs), pairs=pairs)

    def prompt(self, category: str, rng: Random, held_out: bool = False) -> tuple[Prompt, list]:
        """One prompt of this category and one scene that it describes."""
        most = self.max_objects
        count = {"two_objects": min(2, most), "binding": min(2, most), "counting": rng.randint(min(2, most), most),
                 "scene": rng.randint(1, most)}.get(category, 1)
        things = self.scene(rng, held_out, count)
        if category == "counting":                         # one pair, several times
            pair = next((t[:2] for t in things if t[:2] in self.held_out), things[0][:2])
            things = [Thing(*pair, thing.place) for thing in things]
        hide_color, show_place = category in ("one_object", "two_objects"), category in ("place", "scene")
        asked = [Thing(None if hide_color else t.color, t.shape, t.place if show_place else None) for t in things]
        text = (f"{NUMBERS[count]} {things[0].color} {plural(things[0].shape)}" if category == "counting" and count > 1
                else " and ".join(phrase(thing) for thing in asked))
        return Prompt(text, category, tuple(asked)), things

    def sample_t2i(self, n: int, rng: Random, held_out: bool = False, categories=T2I_CATEGORIES):
        """n prompts, categories in turn, and a picture for each: (list of Prompt, codes (n, h,
        w)).
        """
        pairs = [self.prompt(categories[i % len(categories)], rng, held_out) for i in range(n)]
        return [prompt for prompt, _ in pairs], self.draw([scene for _, scene in pairs], rng)

    def fits(self, prompt: Prompt, things: list | None) -> bool:
        """Does the picture that was read as `things` show exactly what the prompt asks for?"""
        return things is not None and len(things) == len(prompt.things) and assignable(prompt.things, things)


    def question(self, category: str, things: list, rng: Random) -> Question:
        """A question on this scene with exactly one right answer."""
        unique = [t for t in things if sum(other[:2] == t[:2] for other in things) == 1]
        target = rng.choice(unique if category in ("place", "existence") and unique else things)
        alone = sum(t.shape == target.shape for t in things) == 1
        if category == "color":
            text = f"what color is the {target.shape} ?" if alone else f"what color is {target.place} ?"
            return Question(text, category, target.color)
        if category == "shape":
            return Question(f"what shape is {target.place} ?", category, target.shape)
        if category == "place" and unique:
            return Question(f"where is the {target.color} {target.shape} ?", category, target.place)
        if category == "count":
            shape = rng.choice([target.shape, rng.choice(self.shapes), None])
            answer = NUMBERS[len(things) if shape is None else sum(t.shape == shape for t in things)]
            return Question(f"how many {plural(shape) if shape else 'objects'} ?", category, answer)
        if category == "existence":
            absent = [pair for pair in self.seen if all(thing[:2] != pair for thing in things)]
            here = unique and (not absent or rng.random() < 0.5)
            if here or absent:  # the answer says where: it is learnt with "where is .."
                color, shape = target[:2] if here else rng.choice(absent)
                return Question(f"is there a {color} {shape} ?", category, target.place if here else "no")
        # "caption", and "place" or "existence" when every object has a twin (and every pair is
        # there)
        return Question("describe ?", "caption", " and ".join(phrase(t) for t in things))

    def sample_mmu(self, n: int, rng: Random, held_out: bool = False, categories=MMU_CATEGORIES):
        """n questions, categories in turn, each on a picture of its own: (list of Question,
        codes (n, h, w)).
        """
        scenes = [self.scene(rng, held_out) for _ in range(n)]
        questions = [self.question(categories[i % len(categories)], scene, rng) for i, scene in enumerate(scenes)]
        return questions, self.draw(scenes, rng)

    def sample_prompts(self, n: int, rng: Random):
        """n prompts to train on and a picture for each, as sample_t2i returns them."""
        return self.sample_t2i(n, rng, categories=DRAWN)

    def sample_dialogues(self, n: int, rng: Random, budget: int):
        """n pictures to train on, DIALOGUES in turn: (list of lists of Question, codes (n, h, w)).

        A question that is over what is left of `budget` (its words, its answer's and two marks a
        turn) is left out, the first always stays. Nothing follows a caption: it would give the
        answers away.
        """
        kinds, dialogues = [DIALOGUES[i % len(DIALOGUES)] for i in range(n)], []
        scenes = [self.alike(rng) if {"existence", "place"} & {*kind} and rng.random() < 0.5 else self.scene(rng)
                  for kind in kinds]
        for kind, scene in zip(kinds, scenes):
            turns, left = [], budget
            for category in kind:
                turn = self.question(category, scene, rng)
                size = len(turn.text.split()) + len(turn.answer.split()) + 2
                if not turns or (size <= left and turns[-1].category != "caption"):
                    turns, left = [*turns, turn], left - size
            dialogues.append(turns)
        return dialogues, self.draw(scenes, rng)


def assignable(asked: tuple, things: list) -> bool:
    """Can every asked thing be given one of `things` of its own?"""
    return not asked or any(all(want in (None, have) for want, have in zip(asked[0], thing))
                            and assignable(asked[1:], things[:i] + things[i + 1:]) for i, thing in enumerate(things))


def plural(shape: str) -> str:
    return shape if shape.endswith("s") and shape != "cross" else shape + ("es" if shape == "cross" else "s")


def phrase(thing: Thing) -> str:
    """"a red ring top-left", without what is None."""
    return " ".join(["a", *(word for word in thing if word is not None)])


def commonest_answers(pairs) -> dict:
    """(question, answer) pairs -> {question: its most frequent answer}."""
    counts = {}
    for text, answer in pairs:
        counts.setdefault(text, Counter())[answer] += 1
    return {text: answers.most_common(1)[0][0] for text, answers in counts.items()}


def blind_answers(world: World, n: int = 4000, seed: int = 0) -> dict:
    """The best answer to every question text without seeing the picture: the most frequent one
    among n samples.
    """
    return commonest_answers((q.text, q.answer) for q in world.sample_mmu(n, Random(f"blind {seed}"))[0])

"""unimod_mini.shapes: the toy world draws, reads, asks and judges exactly."""
from collections import Counter
from itertools import permutations
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unimod_mini import shapes
from unimod_mini.shapes import (BACKGROUND, COLORS, DIALOGUES, MMU_CATEGORIES, NUMBERS, SHADES,
                                SHAPES, T2I_CATEGORIES, Prompt, Thing, World, blind_answers)

seeds = st.integers(0, 10**6)
SINGULAR = {"rings": "ring", "discs": "disc", "crosses": "cross", "diamonds": "diamond",
            "squares": "square", "bars": "bars"}
READING_ORDER = {2: "top-left top-right bottom-left bottom-right".split(),
                 3: ("top-left top top-right left center right "
                     "bottom-left bottom bottom-right").split()}
# what a caption fixes: colour, shape, place
ASKED = {"one_object": "s", "two_objects": "s", "counting": "cs", "colors": "cs", "place": "csp",
         "binding": "cs", "scene": "csp"}
KIND = {"c": "color", "s": "shape", "p": "place"}


@st.composite
def worlds(draw, min_held_out=0, most=4):
    n_colors, n_shapes = draw(st.integers(2, 8)), draw(st.integers(2, 6))
    n_held_out = draw(st.integers(min_held_out, min(n_colors, n_shapes) - 1))
    return World(side=draw(st.sampled_from([2, 3])), max_objects=draw(st.integers(1, most)),
                 n_colors=n_colors, n_shapes=n_shapes, margin=draw(st.integers(0, 1)),
                 n_held_out=n_held_out)


def pixels(world, codes):
    """codes (h, w) -> picture (2 h, 2 w, 3), by loops."""
    h, w = codes.shape
    picture = np.zeros((2 * h, 2 * w, 3), dtype=np.uint8)
    for y in range(h):
        for x in range(w):
            picture[2 * y:2 * y + 2, 2 * x:2 * x + 2] = world.patches[codes[y, x]]
    return picture


def look(world, codes):
    """What a picture shows, found by comparing pixels with the glyphs: a second, slow `read`."""
    picture, things, size = pixels(world, codes), [], 2 * len(codes) // world.side
    names = {}
    for color, value in COLORS.items():
        for shade in SHADES:
            names[tuple(int(v * shade) for v in value)] = color
    glyphs = {}
    for shape, art in SHAPES.items():
        glyphs[",".join(row.rstrip(".") for row in art.split(","))] = shape
    for number, place in enumerate(READING_ORDER[world.side]):
        y, x = size * (number // world.side), size * (number % world.side)
        cell = picture[y:y + size, x:x + size]
        filled = (cell != BACKGROUND).any(-1)
        rows, columns = np.where(filled)
        if len(rows):
            box = slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1)
            shade, = {tuple(pixel.tolist()) for pixel in cell[filled]}      # a single one
            lines = np.where(filled[box], "#", ".").tolist()
            glyph = ",".join("".join(line).rstrip(".") for line in lines)
            things.append(Thing(names[shade], glyphs[glyph], place))
    return things


def right(prompt, things):
    """Does the scene match the prompt? Compares the multisets of what the caption fixes."""
    fixed = ASKED[prompt.category]

    def project(thing):
        return tuple(value for value, letter in zip(thing, "csp") if letter in fixed)

    return Counter(map(project, things)) == Counter(map(project, prompt.things))


def kinds_of(category):
    """What may be asked for this category: a caption where no place or existence can be."""
    return {category, "caption"} if category in ("place", "existence") else {category}


def answers(things, text):
    """Every right answer to a question on a scene, read from its words alone."""
    words = text.removesuffix(" ?").split()
    if text == "describe ?":
        return [" and ".join(f"a {t.color} {t.shape} {t.place}" for t in things)]
    if words[:3] == ["what", "color", "is"]:
        if words[3] == "the":
            return [t.color for t in things if t.shape == words[4]]
        return [t.color for t in things if t.place == words[3]]
    if words[:3] == ["what", "shape", "is"]:
        return [t.shape for t in things if t.place == words[3]]
    if words[:3] == ["where", "is", "the"]:
        return [t.place for t in things if f"{t.color} {t.shape}".endswith(" ".join(words[3:]))]
    if words[:2] == ["how", "many"]:
        if words[2] == "objects":
            return [NUMBERS[len(things)]]
        return [NUMBERS[sum(t.shape == SINGULAR[words[2]] for t in things)]]
    assert words[:3] == ["is", "there", "a"], text
    return [t.place for t in things if [t.color, t.shape] == words[3:]] or ["no"]


# --- Drawing and reading ---

@given(worlds(), seeds)
def test_read_inverts_draw(world, seed):
    """read(draw(scene)) == scene, and so says a second reader that looks at the pixels."""
    rng = Random(seed)
    scenes = [world.scene(rng) for _ in range(4)] + [[]]
    codes = world.draw(scenes, rng)
    assert codes.shape == (5, *world.grid) and codes.dtype == torch.long
    assert world.read(codes) == scenes
    assert [look(world, picture) for picture in codes] == scenes
    assert all(1 <= len(scene) <= world.max_objects for scene in scenes[:-1])


def test_full_board():
    """Nine objects on nine places, each pair of the largest world."""
    world = World(side=3, max_objects=9, n_colors=8, n_shapes=6)
    everything = [Thing(c, s, None) for c, s in world.pairs]
    for start in range(0, len(everything) - 8, 9):
        scene = [t._replace(place=p) for t, p in zip(everything[start:], world.places)]
        codes = world.draw([scene], Random(start))
        assert world.read(codes) == [scene] and look(world, codes[0]) == scene


@given(worlds(), seeds, st.data())
def test_one_broken_patch_is_no_object(world, seed, data):
    """Any one patch replaced by any other: the place shows no exact object and nothing fits."""
    (prompt,), codes = world.sample_t2i(1, Random(seed))
    y, x = (data.draw(st.integers(0, n - 1)) for n in world.grid)
    others = st.integers(0, len(world.patches) - 1).filter(lambda code: code != codes[0, y, x])
    codes[0, y, x] = data.draw(others)
    assert world.read(codes) == [None] and not world.fits(prompt, None)


def test_no_token_gives_a_shape_away():
    """Rings and discs are the same patches in another order, and so are crosses and diamonds."""
    world = World(n_held_out=0)
    used = {pair: world.cells[1 + i].unique().tolist() for i, pair in enumerate(world.pairs)}
    for color in world.colors:
        assert used[color, "ring"] == used[color, "disc"] != used[color, "cross"]
        assert used[color, "cross"] == used[color, "diamond"]
    flat = world.patches.reshape(len(world.patches), -1)
    assert len(flat) == len(np.unique(flat, axis=0))
    assert (world.patches[0] == BACKGROUND).all()


@given(worlds(), seeds)
def test_a_caption_has_several_drawings(world, seed):
    """Two shades, and with a margin four positions: 2 or 8 pictures of an object, all read alike,
    and as many for each of two."""
    rng = Random(seed)
    for count in (1, 2)[:world.max_objects]:
        scene = world.scene(rng, count=count)
        codes = world.draw([scene] * 25 * len(world.ways)**count, rng).unique(dim=0)
        assert len(codes) == (8 if world.margin else 2)**count
        assert world.read(codes) == [scene] * len(codes)


# --- Prompts ---

@given(worlds(), seeds, st.booleans())
def test_own_picture_fits(world, seed, held_out):
    """The picture drawn for a prompt fits it; the caption says what `things` says."""
    prompts, codes = world.sample_t2i(14, Random(seed), held_out=held_out and world.n_held_out > 0)
    for prompt, things in zip(prompts, world.read(codes)):
        assert world.fits(prompt, things) and right(prompt, things)
        asked = [" ".join(["a", *filter(None, thing)]) for thing in prompt.things]
        if prompt.category == "counting" and len(things) > 1:
            number, color, plural = prompt.text.split()
            assert NUMBERS.index(number) == len(things)
            assert {t[:2] for t in (*things, *prompt.things)} == {(color, SINGULAR[plural])}
        else:
            assert prompt.text == " and ".join(asked)


def mistakes(world, things, rng):
    """(name, scene) of every kind of single mistake that this scene has room for."""
    i = rng.randrange(len(things))

    def swap(**change):
        return things[:i] + [things[i]._replace(**change)] + things[i + 1:]

    yield "color", swap(color=rng.choice([c for c in world.colors if c != things[i].color]))
    yield "shape", swap(shape=rng.choice([s for s in world.shapes if s != things[i].shape]))
    yield "missing", things[:i] + things[i + 1:]
    taken = [thing.place for thing in things]
    free = [place for place in world.places if place not in taken]
    if free:
        yield "extra", things + [Thing(*rng.choice(world.pairs), rng.choice(free))]
        yield "place", swap(place=rng.choice(free))


@given(worlds(), seeds)
def test_a_picture_with_one_mistake(world, seed):
    """A wrong colour, shape or place, an object too many or too few fits exactly when the caption
    leaves it open."""
    rng = Random(seed)
    for category in T2I_CATEGORIES:
        prompt, scene = world.prompt(category, rng)
        must_fail = {"missing", "extra", *(KIND[letter] for letter in ASKED[category])}
        for name, wrong in mistakes(world, scene, rng):
            wrong.sort(key=lambda t: world.places.index(t.place))
            assert world.read(world.draw([wrong], rng)) == [wrong]
            assert world.fits(prompt, wrong) == right(prompt, wrong) == (name not in must_fail)


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("xy")), max_size=5),
       st.randoms(use_true_random=False))
def test_assignable_is_any_permutation(things, rng):
    """Each asked thing its own, as trying all orders says; quick where none of 9! orders fits."""
    def blurred(part):
        return rng.choice((part, None, part.swapcase()))

    def in_order(order):
        return all(want in (None, have) for one, thing in zip(asked, order)
                   for want, have in zip(one, thing))

    asked = tuple((blurred(color), blurred(shape)) for color, shape in things)
    assert shapes.assignable(asked, things) == any(map(in_order, permutations(things)))
    assert not shapes.assignable((("c", None), *[("a", None)] * 8), [("a", "x")] * 9)


def test_swapped_colours_do_not_fit():
    """Binding: a blue ring and a red disc are no "red ring and blue disc", in any order."""
    asked = Thing("red", "ring", None), Thing("blue", "disc", None)
    prompt, world = Prompt("a red ring and a blue disc", "binding", asked), World()
    good = [Thing("blue", "disc", "top-left"), Thing("red", "ring", "top-right")]
    bad = [Thing("red", "disc", "top-left"), Thing("blue", "ring", "top-right")]
    assert world.fits(prompt, good) and world.fits(prompt, good[::-1])
    for wrong in (bad, bad[::-1], [], None):
        assert not world.fits(prompt, wrong)


# --- Questions ---

@given(worlds(), seeds, st.booleans())
def test_questions_have_exactly_one_right_answer(world, seed, held_out):
    """Reading the question's words against the picture gives the answer that came with it alone."""
    held_out = held_out and world.n_held_out > 0
    questions, codes = world.sample_mmu(24, Random(seed), held_out=held_out)
    for question, picture in zip(questions, codes):
        assert answers(look(world, picture), question.text) == [question.answer]


def test_existence_on_a_crowded_board():
    """In a world of four pairs a picture can leave no absent one to ask for, and may show every
    one twice: questions still come, and are right."""
    said = set()
    for side, most in ((2, 4), (3, 9)):
        world = World(side=side, max_objects=most, n_colors=2, n_shapes=2, n_held_out=0)
        questions, codes = world.sample_mmu(300, Random(0), categories=("existence",))
        for question, picture in zip(questions, codes):
            assert answers(look(world, picture), question.text) == [question.answer]
            said.add(question.category)
    assert said == {"existence", "caption"}


def test_existence_is_balanced_and_asks_every_pair():
    """Half of the answers say where, for every colour and every shape; the training pairs are
    asked for, all of them and no other."""
    world = World()
    questions, _ = world.sample_mmu(4000, Random(5), categories=("existence",))
    for word in (*world.colors, *world.shapes):
        replies = [q.answer != "no" for q in questions if word in q.text.split()]
        assert 0.4 < sum(replies) / len(replies) < 0.6
    assert {tuple(q.text.split()[3:5]) for q in questions} == set(world.seen)


@given(worlds(), seeds)
def test_alike_scenes(world, seed):
    """One shape, every colour once, training pairs at distinct places, two or more if possible."""
    things = world.alike(Random(seed))
    assert len({t.shape for t in things}) == 1
    assert len({t.color for t in things}) == len({t.place for t in things}) == len(things)
    assert {t[:2] for t in things} <= set(world.seen)
    same = sum(shape == things[0].shape for _, shape in world.seen)
    assert min(2, world.max_objects, same) <= len(things) <= world.max_objects


def test_places_are_asked_among_objects_of_one_shape():
    """About half of the training scenes where a place is asked show several of one shape."""
    world = World()
    dialogues, codes = world.sample_dialogues(1200, Random(0), 19)
    same = []
    for turns, things in zip(dialogues, world.read(codes)):
        if "place" in [question.category for question in turns]:
            same.append(len(things) > 1 and len({t.shape for t in things}) == 1)
    assert 0.5 < sum(same) / len(same) < 0.75


def test_place_is_asked_whenever_it_can_be():
    """A place question becomes a caption only when every object of the picture has a twin."""
    world = World(n_colors=2, n_shapes=2, n_held_out=0)
    questions, codes = world.sample_mmu(400, Random(2), categories=("place",))
    for question, things in zip(questions, world.read(codes)):
        unique = 1 in Counter(t[:2] for t in things).values()
        assert question.category == ("place" if unique else "caption")
    assert {q.category for q in questions} == {"place", "caption"}


def test_every_kind_of_question_is_asked():
    """Colours by shape and by place, counts of one shape and of all, from zero to max_objects."""
    questions, _ = World().sample_mmu(1200, Random(0))
    starts = {q.text.rsplit(" ", 2)[0] for q in questions}
    assert {"what color is the", "what color is", "what shape is", "how many"} <= starts
    assert {q.answer for q in questions if q.category == "count"} == {"zero", "one", "two", "three"}
    assert {q.text for q in questions if q.category == "count"} == {
        f"how many {w} ?" for w in ("rings", "discs", "crosses", "diamonds", "objects")}


@given(worlds(), seeds, st.integers(1, 60))
def test_dialogues(world, seed, budget):
    """Turns on one picture of the training world, all answered rightly, none twice, as DIALOGUES
    plan them, within the budget (but never none), and nothing after a caption."""
    dialogues, codes = world.sample_dialogues(23, Random(seed), budget)
    for i, (turns, picture) in enumerate(zip(dialogues, codes, strict=True)):
        scene = look(world, picture)
        assert all(t[:2] in world.seen for t in scene)
        assert all(answers(scene, q.text) == [q.answer] for q in turns)
        assert 1 <= len(turns) == len({q.text for q in turns})
        size = sum(len(f"{q.text} {q.answer}".split()) + 2 for q in turns)
        assert size <= budget or len(turns) == 1
        assert all(q.category != "caption" for q in turns[:-1])
        planned = iter(DIALOGUES[i % len(DIALOGUES)])
        for question in turns:
            assert any(question.category in kinds_of(category) for category in planned)


def test_dialogues_give_no_later_answer_away():
    """Every category opens a dialogue; nothing is asked after a question that says it; the toy's
    budget holds nearly all turns."""
    assert {first for first, *_ in DIALOGUES} == set(MMU_CATEGORIES)
    says = {"place": {"existence", "color", "shape"}, "color": {"existence"},
            "shape": {"existence", "place"}, "count": {"existence"},
            "existence": {"color", "shape", "place"}}
    for first, *later in DIALOGUES:
        assert not says.get(first, set()) & {*later}
    world = World()
    asked, _ = world.sample_dialogues(1000, Random(0), world.longest_text + 2)
    assert sum(map(len, asked)) / 1000 > 1.6
    assert {len(turns) for turns in world.sample_dialogues(20, Random(0), 1)[0]} == {1}


def test_training_draws_every_category():
    """sample_prompts has what sample_t2i has, bindings and scenes more often."""
    prompts, codes = World().sample_prompts(20, Random(0))
    names = [prompt.category for prompt in prompts]
    assert len(codes) == 20 and set(names) == set(T2I_CATEGORIES) and names.count("binding") == 6


# --- Samples ---

@given(worlds(min_held_out=1), seeds)
def test_held_out_pairs(world, seed):
    """No training picture or caption shows a held-out pair, every held_out=True picture does, and
    every colour and shape is in training."""
    held, seen, rng = set(world.held_out), set(world.seen), Random(seed)
    for sample in (world.sample_t2i, world.sample_mmu):
        texts, codes = sample(21, rng)
        assert all(t[:2] not in held for things in world.read(codes) for t in things)
        if sample == world.sample_t2i:
            assert all(t[:2] not in held for prompt in texts for t in prompt.things)
        _, codes = sample(21, rng, held_out=True)
        for things in world.read(codes):
            assert held & {t[:2] for t in things}
    assert len(held) == world.n_held_out and held | seen == set(world.pairs) and not held & seen
    assert {color for color, _ in seen} == set(world.colors)
    assert {shape for _, shape in seen} == set(world.shapes)


def test_asking_for_held_out_pairs_where_there_are_none():
    """held_out=True in a world without held-out pairs is a ValueError that says so."""
    for sample in (World(n_held_out=0).sample_t2i, World(n_held_out=0).sample_mmu):
        with pytest.raises(ValueError, match="held"):
            sample(1, Random(0), held_out=True)


@given(worlds(), seeds)
def test_vocabulary(world, seed):
    """Every word of every caption, question and answer is in world.words, which has no double."""
    rng = Random(seed)
    prompts, _ = world.sample_t2i(14, rng)
    questions, _ = world.sample_mmu(18, rng)
    texts = [p.text for p in prompts] + [f"{q.text} {q.answer}" for q in questions]
    assert set(" ".join(texts).split()) <= set(world.words)
    assert len(set(world.words)) == len(world.words)


def test_no_idle_word():
    """Some text uses every word of the default world: an idle one is a row that never trains."""
    world = World()
    prompts, _ = world.sample_t2i(1500, Random(0))
    questions, _ = world.sample_mmu(1500, Random(0))
    texts = [p.text for p in prompts] + [f"{q.text} {q.answer}" for q in questions]
    assert set(" ".join(texts).split()) == set(world.words)


@given(worlds())
def test_longest_text(world):
    """longest_text is the length of the longest question with its answer, and none exceeds it."""
    rng = Random(0)
    full = world.question("caption", world.scene(rng, count=world.max_objects), rng)
    sizes = [len(text.split()) for text in ("what color is the ring ? red",
                                            f"{full.text} {full.answer}")]
    assert max(sizes) == world.longest_text
    questions, _ = world.sample_mmu(60, rng)
    assert all(len(f"{q.text} {q.answer}".split()) <= world.longest_text for q in questions)


@given(worlds(), seeds)
def test_determinism(world, seed):
    """The generator's seed decides everything: texts, scenes and how they are drawn."""
    for sample in (world.sample_t2i, world.sample_mmu):
        texts, codes = sample(24, Random(seed))
        again, same = sample(24, Random(seed))
        _, other = sample(24, Random(seed + 1))
        assert texts == again and torch.equal(codes, same) and not torch.equal(codes, other)


def test_categories_come_in_turn():
    """Sample i has category i modulo their number; a choice of categories is obeyed."""
    world = World(n_colors=8, n_shapes=6)
    drawn = [p.category for p in world.sample_t2i(15, Random(0))[0]]
    assert drawn == list((T2I_CATEGORIES * 3)[:15])
    asked = [q.category for q in world.sample_mmu(13, Random(0))[0]]
    for got, category in zip(asked, MMU_CATEGORIES * 3):
        assert got in kinds_of(category)
    prompts, _ = world.sample_t2i(3, Random(0), categories=("scene", "place"))
    assert [p.category for p in prompts] == ["scene", "place", "scene"]


def test_counts_and_reading_order():
    """Scenes have 1 to max_objects objects, "two_objects" has two; captions list them in reading
    order; a drawing in the other order fits a caption without places all the same."""
    world, rng = World(), Random(3)
    counts = {"scene": {1, 2, 3}, "counting": {2, 3}, "two_objects": {2}, "binding": {2},
              "one_object": {1}, "colors": {1}, "place": {1}}
    for category, expected in counts.items():
        assert {len(world.prompt(category, rng)[1]) for _ in range(100)} == expected
    for _ in range(50):
        prompt, (first, second) = world.prompt("binding", rng)
        assert [t[:2] for t in prompt.things] == [first[:2], second[:2]]
        swapped = [Thing(*second[:2], first.place), Thing(*first[:2], second.place)]
        assert world.fits(prompt, swapped)


@pytest.mark.parametrize("name, wrong", [
    ("side", (1, 4)), ("max_objects", (0, 5)), ("n_colors", (1, 9)), ("n_shapes", (1, 7)),
    ("n_held_out", (-1, 4)), ("margin", (-1, 2))])
def test_impossible_worlds(name, wrong):
    """A setting outside its limits is a ValueError that names it; the limits themselves are not."""
    for value in wrong:
        with pytest.raises(ValueError, match=f"World: {name} must lie in .* got {value}"):
            World(**{name: value})
    with pytest.raises(ValueError, match="n_held_out must lie in"):
        World(n_colors=2, n_held_out=2)
    for possible in (dict(side=3, max_objects=9), dict(n_colors=2, n_shapes=6, n_held_out=1),
                     dict(n_colors=8, n_held_out=3)):
        World(**possible)


# --- Blind answers ---

def test_blind_answers_know_only_the_text():
    """One answer a question text, the same for the same seed, about as good as chance."""
    world = World()
    blind = blind_answers(world, n=3000)
    assert blind == blind_answers(world, n=3000) != blind_answers(world, n=3000, seed=1)
    questions, _ = world.sample_mmu(3000, Random(1))
    hits = {category: [] for category in MMU_CATEGORIES}
    for question in questions:
        hits[question.category].append(blind.get(question.text) == question.answer)
    rate = {category: sum(hit) / len(hit) for category, hit in hits.items()}
    limits = {"place": 0.32, "color": 0.3, "shape": 0.4, "existence": 0.65, "caption": 0.05,
              "count": 0.6}
    assert all(rate[category] < limit for category, limit in limits.items())
    assert rate["count"] > 0.33


def test_blind_answers_are_the_most_frequent():
    """Where the text decides, blind is right; elsewhere no other fixed answers do much better."""
    sure = blind_answers(World(max_objects=1), n=600)
    assert sure["how many objects ?"] == "one"
    world, counts = World(), {}
    blind = blind_answers(world, n=3000)
    for question in world.sample_mmu(3000, Random(77), categories=("count", "existence"))[0]:
        counts.setdefault(question.text, Counter())[question.answer] += 1
    hits = sum(count[blind.get(text)] for text, count in counts.items())
    best = sum(count.most_common(1)[0][1] for count in counts.values())
    assert best >= hits > 0.85 * best

"""unimod_mini.toy_language: what people write becomes the toy world's own texts, and is judged."""
from collections import Counter
from random import Random

import pytest
from helpers import seeds
from hypothesis import given, settings
from hypothesis import strategies as st
from test_shapes import answers, worlds

from unimod_mini.shapes import NUMBERS, Prompt, Thing, World, caption, plural
from unimod_mini.toy_language import answer, example, held_out, read_prompt, tidy

SMALLEST = World(max_objects=1, n_colors=2, n_shapes=2, n_held_out=0)
BIGGEST = World(side=3, max_objects=9, n_colors=8, n_shapes=6, margin=1, n_held_out=5)
fixed = st.sampled_from((World(), World(side=3, margin=1), SMALLEST, BIGGEST))
anywhere = st.one_of(fixed, worlds())


def samples(world, seed, n=14):
    """Prompts, their scenes, questions and theirs, without held-out pairs and with them."""
    rng, out = Random(seed), ([], [], [], [])
    for unseen in (False, True)[:1 + (world.n_held_out > 0)]:
        prompts, drawn = world.sample_t2i(n, rng, unseen)
        questions, asked = world.sample_mmu(n, rng, unseen)
        for part, more in zip(out, (prompts, world.read(drawn), questions, world.read(asked))):
            part += more
    return out


def texts_of(world, seed):
    """Captions and questions of every sampler."""
    prompts, _, questions, _ = samples(world, seed)
    dialogues, _ = world.sample_dialogues(7, Random(seed), 30)
    return [part.text for part in sum(dialogues, prompts + questions)]


def as_people_write(text, rng):
    """The same text in other letters, marks, blanks and spellings."""
    def one_of(*spellings):
        return rng.choice(spellings)

    asks = text.endswith(" ?")
    joined = one_of(" and ", ", ", ",", " , and ")
    words = text.removesuffix(" ?").replace(" and ", joined).split(" ")
    for i, word in enumerate(words):
        if word in NUMBERS[2:]:
            words[i] = one_of(word, str(NUMBERS.index(word)))
        if word == "a":
            words[i] = one_of("a", "an", "one", "1")
        if word in ("center", "color"):
            words[i] = one_of(word, {"center": "centre", "color": "colour"}[word])
        words[i] = one_of(words[i], words[i].replace("-", " "))
    end = one_of(" ?", "?", "", ".", "??") if asks else one_of("", ".", " !")
    line = one_of(" ", "  ", "\t").join(words) + end
    return one_of("", " ") + one_of(line, line.upper(), line.capitalize()) + one_of("", "\n")


# -------------------------------------------------------------------------------------------- tidy

@given(anywhere, seeds)
def test_the_worlds_own_texts_are_tidy(world, seed):
    """Every caption, question and answer stays as it is."""
    said = [question.answer for question in samples(world, seed)[2]]
    for text in texts_of(world, seed) + said:
        assert tidy(world, text) == text


@given(anywhere, seeds)
def test_what_people_write_becomes_the_worlds_text(world, seed):
    """Any case, marks, blanks, numerals and spellings."""
    rng = Random(seed)
    for text in texts_of(world, seed):
        assert tidy(world, as_people_write(text, rng)) == text


@given(anywhere, st.data())
def test_tidy_once_is_tidy(world, data):
    """Any words and marks become the world's words; a second time changes nothing."""
    word = st.sampled_from((*world.words, ",", ".", "!", "an", "1", "0", "colour", "top left"))
    text = data.draw(st.sampled_from((" ", "  "))).join(data.draw(st.lists(word, max_size=8)))
    try:
        once = tidy(world, text)
    except ValueError:                                     # nothing but marks
        assert not {*text.split()} - {",", ".", "!", "?", "and"}
        return
    assert tidy(world, once) == once and {*once.split()} <= {*world.words}
    assert once.count("?") <= 1 and "and and" not in once


@pytest.mark.parametrize("given, text", [
    ("A Red Ring, a blue disc, and a cross.", "a red ring and a blue disc and a cross"),
    ("2 red RINGS.", "two red rings"), ("an orange ring top left", "a orange ring top-left"),
    ("1 ring,", "a ring"), ("What colour is the ring", "what color is the ring ?"),
    ("how many rings?", "how many rings ?"), ("describe", "describe ?"),
    ("a red ring?", "a red ring ?")])
def test_tidied(given, text):
    assert tidy(World(n_colors=8), given) == text


def refusal(world, text):
    with pytest.raises(ValueError) as error:
        tidy(world, text)
    assert "\n" not in str(error.value)
    return str(error.value)


@settings(max_examples=15)
@given(fixed, seeds)
def test_an_unknown_word_is_told_what_fits(world, seed):
    """In place of any word: the error names the one before, and the word as one that fits."""
    rng = Random(seed)
    text = rng.choice(texts_of(world, seed))
    words = text.removesuffix(" ?").split()
    i = rng.randrange(len(words))
    said = refusal(world, " ".join([*words[:i], "zzz", *words[i + 1:]]))
    where = f"behind {words[i - 1]!r}" if i else "at the beginning"
    assert said.startswith(f"unknown word 'zzz' {where}: write one of the ")
    assert words[i] in said.partition(": ")[2].replace(",", "").replace(";", "").split()


@pytest.mark.parametrize("text, error", [
    ("a green-ish ring", "unknown word 'green-ish' behind 'a' (did you mean 'green'?): write one "
     "of the colors red, green, blue, yellow, purple, cyan; shapes ring, disc, cross, diamond"),
    ("how many ringz", "unknown word 'ringz' behind 'many' (did you mean 'rings'?): write one of "
     "the shapes rings, discs, crosses, diamonds; words objects"),
    ("a ring under a disc", "unknown word 'under' behind 'ring': write one of the places top-left, "
     "top-right, bottom-left, bottom-right; words and"),
    ("5 rings", "unknown word 'five' at the beginning: write one of the numbers two, three; "
     "words a, what, is, where, how, describe"),
    ("describe it", "unknown word 'it' behind 'describe': leave it out, nothing fits")])
def test_errors_in_words(text, error):
    """Grouped by kind, in the world's own order, the nearest first, held-out pairs among them."""
    assert refusal(World(), text) == error


def test_rare_words_fit_too():
    """Of 64 pairs of a number and a colour in the biggest world none is missed."""
    for number in NUMBERS[2:]:
        colors = ", ".join(BIGGEST.colors)
        assert refusal(BIGGEST, f"{number} zzz rings").endswith(f"write one of the colors {colors}")


@given(anywhere, st.text(" ,.?!\n\t"))
def test_nothing_written(world, text):
    """Blanks and marks alone: the error shows a caption and a question of trained pairs."""
    said = refusal(world, text)
    assert all(repr(one) in said for one in example(world)) and not held_out(world, said)


# ----------------------------------------------------------------------------------------- judging

@given(anywhere, seeds)
def test_captions_are_read(world, seed):
    """Reading a sampled prompt gives its things, so the same pictures fit."""
    prompts, scenes, *_ = samples(world, seed)
    for prompt in prompts:
        read = read_prompt(world, prompt.text)
        assert read.text == prompt.text and read.things == prompt.things
        for things in scenes:
            assert world.fits(read, things) == world.fits(prompt, things)


@st.composite
def captions(draw, world):
    """(caption, things): colours, places and numbers named or not, whatever the sampler makes."""
    parts, things = [], []
    for _ in range(draw(st.integers(1, 4))):
        number = draw(st.integers(1, world.max_objects))
        color = draw(st.sampled_from((None, *world.colors)))
        shape = draw(st.sampled_from(world.shapes))
        place, noun = None, [NUMBERS[number], color, plural(shape)]
        if number == 1:
            place = draw(st.sampled_from((None, *world.places)))
            noun = ["a", color, shape, place]
        parts.append(" ".join(word for word in noun if word))
        things += [Thing(color, shape, place)] * number
    return " and ".join(parts), things


@given(anywhere, st.data())
def test_any_caption_is_read(world, data):
    """Also those that the sampler never makes; they are tidy."""
    text, things = data.draw(captions(world))
    assert tidy(world, text) == text
    assert Counter(read_prompt(world, text).things) == Counter(things)


def test_mixed_caption():
    ring, disc = Thing(None, "ring", None), Thing("blue", "disc", "top")
    asked = read_prompt(World(side=3), "two rings and a blue disc top").things
    assert asked == (ring, ring, disc)


@given(anywhere, seeds)
def test_no_caption(world, seed):
    """Questions are no captions."""
    for question in samples(world, seed)[2]:
        assert read_prompt(world, question.text) is None


@pytest.mark.parametrize("text", [
    "", "a", "red ring", "a ring red", "a rings", "two ring", "two rings top-left", "zero rings",
    "a ring a disc", "a ring and", "a red", "no objects", "nine rings", "two a ring", "a ring top",
    "a ring ?"])
def test_no_caption_of_this_world(text):
    assert read_prompt(World(), text) is None


@given(anywhere, seeds)
def test_answers_are_right(world, seed):
    """On any scene, its own or another's: the one right answer, None for none and for two."""
    *_, questions, scenes = samples(world, seed)
    for question, scene in zip(questions, scenes):
        assert answer(world, question.text, scene) == question.answer
        for other in scenes:
            right = answers(other, question.text)
            assert answer(world, question.text, other) == (right[0] if len(right) == 1 else None)


def test_answers_that_the_world_never_asks_for():
    """Twins and empty pictures have no single answer; colours may be left out, or counted."""
    scene = [Thing("red", "ring", "top-left"), Thing("red", "ring", "top-right"),
             Thing("red", "disc", "bottom-left")]
    right = {"is there a red ring ?": None, "where is the red ring ?": None,
             "what color is the ring ?": None, "what color is the red disc ?": "red",
             "is there a disc ?": "bottom-left", "where is the disc ?": "bottom-left",
             "is there a blue ring ?": "no", "what shape is bottom-right ?": None,
             "how many red rings ?": "two", "how many blue rings ?": "zero",
             "how many objects ?": "three", "how many red ?": None, "how many ring ?": None,
             "is there a ring a disc ?": None, "what place is top-left ?": None, "a red disc": None}
    assert {text: answer(World(), text, scene) for text in right} == right
    none = {"describe ?": None, "how many objects ?": "zero", "is there a red ring ?": "no"}
    assert {text: answer(World(), text, []) for text in none} == none
    assert caption([]) == "no objects"


@given(anywhere, seeds)
def test_held_out_pairs_are_named(world, seed):
    """Those pairs of a text that training never shows, in plurals and questions too, each once."""
    prompts, *_ = samples(world, seed)
    for prompt in prompts:
        named = {thing[:2] for thing in prompt.things} & {*world.held_out}
        found = held_out(world, prompt.text)
        assert set(found) == named and len(found) == len(named)
    for color, shape in world.pairs:
        pair = ((color, shape),) if (color, shape) in world.held_out else ()
        one, many = f"{color} {shape}", f"{color} {plural(shape)}"
        for text in (f"a {one}", f"three {many}", f"is there a {one} ?", f"how many {many} ?"):
            assert held_out(world, text) == pair


@given(anywhere)
def test_examples(world):
    """A caption and a question that the world makes, of trained pairs alone, always the same."""
    text, question = example(world)
    asked = read_prompt(world, text).things
    assert isinstance(read_prompt(world, text), Prompt) and len(asked) == min(2, world.max_objects)
    assert {thing[:2] for thing in asked} <= {*world.seen} and len({*asked}) == len(asked)
    assert answer(world, question, []) == "no" and not held_out(world, question)
    assert tidy(world, text) == text and tidy(world, question) == question
    assert example(world) == (text, question)

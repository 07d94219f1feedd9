"""unimod_mini.tokenizer: ids and back, and the published layouts to the last id."""
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unimod_mini.tokenizer import IGNORE, SPECIAL, ByteText, Palette, Tokenizer, WordText
from unimod_mini.vq import VQ

seeds = st.integers(0, 10**6)
X = IGNORE


class Codes:
    """An image codec that knows nothing but its size."""

    def __init__(self, n_codes):
        self.n_codes = n_codes


def showo(grid=(2, 2), text_length=5):
    """a b c d = 0 1 2 3, sot 4, eot 5, [PAD] 6, soi 7, eoi 8, sov eov, t2i 11, mmu 12, .., codes
    16 to 20, mask 21.
    """
    return Tokenizer("showo", WordText("abcd"), Codes(5), grid, text_length)


def emu3(grid=(2, 2), text_length=3, size="2*2"):
    """a b c d = 0 1 2 3, size 4, sys 5, asst 6, [PAD] 7, BOS 8, EOS 9, boi 10, img 11, EOL 12, EOF
    13, eoi 14, codes 15 to 19.
    """
    text = WordText(["a", "b", "c", "d", size, "sys", "asst"])
    return Tokenizer("emu3", text, Codes(5), grid, text_length, system="sys", assistant="asst")


PICTURE = torch.tensor([[[0, 1], [2, 4]]])


def rows(tensor):
    return None if tensor is None else tensor.tolist()


def same(batch, ids, spans, padding, labels):
    """Compare a Batch with lists, to the last id. padding: 1 where valid must be False."""
    assert batch.ids.tolist() == ids and batch.ids.dtype == torch.long
    assert rows(batch.spans) == spans
    valid = torch.ones_like(batch.ids, dtype=torch.bool) if batch.valid is None else batch.valid
    assert valid.dtype == torch.bool and (~valid).long().tolist() == padding
    assert batch.labels.tolist() == labels and batch.labels.dtype == torch.long



@given(st.lists(st.sampled_from("red ring a top-left ?".split())), st.sampled_from([" ", "  ", " \n\t "]))
def test_words_round_trip(words, blank):
    """decode(encode(x)) is x up to runs of blanks; ids count the words of the list, doubles
    once.
    """
    text = WordText("a red ring a top-left ? red".split())
    assert text.size == 5 and text.encode("a red ring top-left ?") == [0, 1, 2, 3, 4]
    assert text.decode(text.encode(blank + blank.join(words))) == " ".join(words)


def test_unknown_word_names_the_nearest():
    """A misspelt word is a ValueError that quotes it and the nearest known word; a hopeless one
    is quoted alone.
    """
    text = WordText("a red ring purple".split())
    with pytest.raises(ValueError, match=r"'pruple'.*'purple'"):
        text.encode("a pruple ring")
    with pytest.raises(ValueError, match="'xyz'") as error:
        text.encode("xyz")
    assert "did you mean" not in str(error.value)
    assert text.encode("") == [] and text.decode([]) == ""


@given(st.text(max_size=40))
def test_bytes_round_trip(string):
    """Any unicode text comes back; ids are its UTF-8 bytes."""
    ids = ByteText().encode(string)
    assert ByteText().decode(ids) == string and bytes(ids) == string.encode() and all(0 <= i < 256 for i in ids)


@pytest.mark.parametrize("text", [WordText("ab"), ByteText()])
def test_decoding_skips_what_is_not_text(text):
    """Ids of other kinds (special, image) and negative ones are left out; a cut character does
    not raise.
    """
    ids = text.encode("a b")
    assert text.decode([-1, *ids, text.size, 10**6]) == "a b"
    assert isinstance(ByteText().decode([0xe2, 0x82]), str)



def palette(n, patch, seed=0):
    """n distinct patches."""
    patches = np.random.default_rng(seed).integers(0, 256, (n, patch, patch, 3), dtype=np.uint8)
    patches[:, 0, 0, 0] = np.arange(n)
    return Palette(patches)


@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 4), st.integers(1, 4), st.booleans(), seeds)
def test_palette_round_trip(patch, n, h, w, strided, seed):
    """Pictures made of the palette's patches survive exactly, also as a non-contiguous view;
    patches lie in place.
    """
    tokens = palette(n, patch, seed)
    codes = torch.randint(n, (3, h, w), generator=torch.Generator().manual_seed(seed))
    images = tokens.decode(codes)
    assert images.dtype == torch.uint8 and images.shape == (3, h * patch, w * patch, 3)
    for y in range(h):
        for x in range(w):
            place = images[1, y * patch:(y + 1) * patch, x * patch:(x + 1) * patch]
            assert torch.equal(place, tokens.patches[codes[1, y, x]])
    if strided:
        images = images.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    again = tokens.encode(images)
    assert torch.equal(again, codes) and again.dtype == torch.long
    assert torch.equal(tokens.decode(again), images) and tokens.n_codes == n and tokens.patch == patch


def test_palette_crop():
    """A window into a larger picture, cut at patch borders, gives the codes of that window."""
    tokens, codes = palette(9, 2), torch.randint(9, (2, 5, 6))
    assert torch.equal(tokens.encode(tokens.decode(codes)[:, 2:8, 4:]), codes[:, 1:4, 2:])


def test_palette_takes_the_nearest_patch():
    """Every patch of any picture is coded by the patch at the smallest squared distance
    (integers, by loops).
    """
    tokens = palette(50, 2)
    images = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (4, 10, 6, 3), dtype=np.uint8))
    codes = tokens.encode(images)
    for b, y, x in np.ndindex(4, 5, 3):
        patch = images[b, 2 * y:2 * y + 2, 2 * x:2 * x + 2].long()
        assert int(codes[b, y, x]) == int((tokens.patches.long() - patch).square().sum((1, 2, 3)).argmin())


def noise(seed=0, n=6):
    """Pictures with smooth and rough parts."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 200, 16)[None, :, None, None] + np.linspace(0, 50, 16)[None, None, :, None]
    return torch.from_numpy((ramp + rng.integers(0, 30, (n, 16, 16, 3))).clip(0, 255).astype(np.uint8))


def error(tokens, images):
    return float((tokens.decode(tokens.encode(images)).float() - images.float()).square().mean())


def test_fit_lowers_the_error():
    """More codes: a lower squared error; more rounds of k-means: a lower one than that of random
    patches.
    """
    images = noise()
    errors = [error(Palette.fit(images, n_codes=n), images) for n in (1, 4, 16, 64)]
    assert all(fewer > more for fewer, more in zip(errors, errors[1:]))
    assert error(Palette.fit(images, 16, rounds=10), images) < 0.95 * error(Palette.fit(images, 16, rounds=0), images)
    mean = images.view(6, 8, 2, 8, 2, 3).transpose(2, 3).float().mean((0, 1, 2)).round()
    assert torch.equal(Palette.fit(images, n_codes=1).patches[0].float(), mean)


def test_fit_is_deterministic():
    """The seed decides; the global generator is neither read nor moved."""
    state = torch.manual_seed(5).get_state()
    first = Palette.fit(noise(), 12, seed=3).patches
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    assert torch.equal(Palette.fit(noise(), 12, seed=3).patches, first)
    assert not torch.equal(Palette.fit(noise(), 12, seed=4).patches, first)


@pytest.mark.parametrize("n_codes", [7, 8, 100])
def test_fit_with_more_codes_than_patches(n_codes):
    """As many codes as distinct patches, or more: pictures survive exactly and no code is
    invented.
    """
    images = palette(7, 2).decode(torch.arange(7).repeat(4).view(1, 4, 7))
    tokens = Palette.fit(images, n_codes=n_codes)
    assert tokens.n_codes == 7 and torch.equal(tokens.decode(tokens.encode(images)), images)


@pytest.mark.parametrize("call", [
    lambda p: p.encode(torch.zeros(1, 5, 4, 3, dtype=torch.uint8)), lambda p: p.encode(torch.zeros(1, 4, 5, 3).byte()),
    lambda p: p.encode(torch.zeros(1, 4, 4, 3)), lambda p: p.encode(torch.zeros(4, 4, 3).byte()),
    lambda p: p.encode(torch.zeros(1, 4, 4, 1).byte()), lambda p: p.encode(torch.zeros(0, 4, 4, 3).byte()),
    lambda p: p.decode(torch.tensor([[[3]]])), lambda p: p.decode(torch.tensor([[[-1]]])),
    lambda p: Palette(torch.zeros(3, 2, 2)), lambda p: Palette(torch.zeros(3, 2, 1, 3)),
    lambda p: Palette(torch.zeros(0, 2, 2, 3)),
    lambda p: Palette.fit(torch.zeros(1, 3, 4, 3).byte()), lambda p: Palette.fit(torch.zeros(1, 4, 4, 3).byte(), 0),
    lambda p: Palette.fit(torch.zeros(1, 4, 4, 3).byte(), patch=0)])
def test_palette_errors(call):
    """Pictures of another dtype, shape or size, codes outside [0, n) and odd patches are
    ValueErrors.
    """
    tokens = palette(3, 2)
    # the right ones pass
    tokens.encode(torch.zeros(1, 4, 4, 3).byte()), tokens.decode(torch.tensor([[[2]]]))
    with pytest.raises(ValueError, match="images|codes|patches"):
        call(tokens)



@pytest.mark.parametrize("tokens", [showo(), emu3()], ids=["showo", "emu3"])
def test_vocabulary_does_not_overlap(tokens):
    """Text, special ids, codes and mask tile [0, vocab_size) without overlap; every id has a
    name of its own.
    """
    text, codes = range(tokens.text.size), range(tokens.image_start, tokens.image_end)
    mask = [] if tokens.mask_id is None else [tokens.mask_id]
    assert sorted([*text, *tokens.special.values(), *codes, *mask]) == list(range(tokens.vocab_size))
    assert len({tokens.name(i) for i in range(tokens.vocab_size)}) == tokens.vocab_size


def test_names():
    """name(i) is the word, the special name, <code> or [MASK]."""
    names = "a b c d sot eot [PAD] soi eoi sov eov t2i mmu t2v v2v lvg <0> <1> <2> <3> <4> [MASK]"
    assert [showo().name(i) for i in range(22)] == names.split()
    names = "a b c d 2*2 sys asst [PAD] BOS EOS boi img EOL EOF eoi <0> <1> <2> <3> <4>"
    assert [emu3().name(i) for i in range(20)] == names.split()
    for tokens in (showo(), emu3()):
        with pytest.raises((KeyError, ValueError)):
            tokens.name(tokens.vocab_size)
        assert tokens.special["[PAD]"] == tokens.pad
    assert showo().name(showo().eot) == "eot" and emu3().name(emu3().eot) == "EOS"


def test_true_showo_vocabulary():
    """50,295 text ids with sot and eot, [PAD] first of 10 specials, 8,192 codes, the mask last:
    58,498.
    """
    text = ByteText()
    text.size = 50_295 - 2
    tokens = Tokenizer("showo", text, Codes(8_192), (16, 16), 128)
    assert tokens.special["eot"] == 50_294 and tokens.pad == 50_295 and len(SPECIAL["showo"]) == 10
    assert tokens.image_start == 50_305 and tokens.mask_id == 58_497 and tokens.vocab_size == 58_498
    assert {tokens.length(task) for task in ("t2i", "mmu", "lm")} == {387}
    assert Tokenizer("showo", text, Codes(8_192), (16, 16), 381).length("t2i") == 640
    assert Tokenizer("showo", text, Codes(8_192), (32, 32), 381).length("t2i") == 1_408


def test_true_emu3_image():
    """512 x 512 pixels are 64 rows of 64 codes and an EOL: h (w + 1) ids; there is no mask id."""
    tokens = Tokenizer("emu3", ByteText(), Codes(32_768), (64, 64), 8)
    assert tokens.image_ids(torch.zeros(1, 64, 64, dtype=torch.long)).shape == (1, 4_160)
    assert tokens.mask_id is None and tokens.vocab_size == 256 + 8 + 32_768
    assert tokens.t2i_prompt("hi") == [tokens.special["BOS"], *b"hi", tokens.special["boi"], *b"64*64",
                                       tokens.special["img"]]



def test_showo_t2i():
    """[PAD..] t2i sot text eot soi N codes eoi, padded on the left; the codes are labels where
    they stand.
    """
    batch = showo().t2i(["a b", "", "c c d"], PICTURE.repeat(3, 1, 1))
    image, label = [7, 16, 17, 18, 20, 8], [X, 16, 17, 18, 20, X]
    same(batch, [[6, 11, 4, 0, 1, 5, *image], [6, 6, 6, 11, 4, 5, *image], [11, 4, 2, 2, 3, 5, *image]],
         [[0] * 6 + [1] * 6] * 3, [[1] + [0] * 11, [1] * 3 + [0] * 9, [0] * 12], [[X] * 6 + label] * 3)


def test_showo_mmu():
    """mmu soi N codes eoi sot question answer eot [PAD..]; span mmu..eoi; the answer and its end
    are shifted labels.
    """
    batch = showo().mmu(["a", "", "d"], ["b", "", "b c"], PICTURE.repeat(3, 1, 1))
    image = [12, 7, 16, 17, 18, 20, 8]
    same(batch, [[*image, 4, 0, 1, 5, 6], [*image, 4, 5, 6, 6, 6], [*image, 4, 3, 1, 2, 5]], [[1] * 7 + [0] * 5] * 3,
         [[0] * 11 + [1], [0] * 9 + [1] * 3, [0] * 12],
         [[X] * 8 + [1, 5, X, X], [X] * 7 + [5] + [X] * 4, [X] * 8 + [1, 2, 5, X]])


def test_showo_lm():
    """sot text eot [PAD..], as long as the other tasks; all of it is labelled, shifted."""
    same(showo().lm(["a b", "", "a b c d a b c d a b"]),
         [[4, 0, 1, 5] + [6] * 8, [4, 5] + [6] * 10, [4, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 5]], None,
         [[0] * 4 + [1] * 8, [0] * 2 + [1] * 10, [0] * 12],
         [[0, 1, 5] + [X] * 9, [5] + [X] * 11, [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 5, X]])


def test_emu3_t2i():
    """BOS text boi h*w img row EOL row EOL EOF eoi EOS [PAD..]; the codes alone are labels,
    shifted.
    """
    image = [10, 4, 11, 15, 16, 12, 17, 19, 12, 13, 14, 9]
    label = [X, X, 15, 16, X, 17, 19, X, X, X, X, X]
    same(emu3().t2i(["a b", "", "a c d"], PICTURE.repeat(3, 1, 1)),
         [[8, 0, 1, *image, 7], [8, *image, 7, 7, 7], [8, 0, 2, 3, *image]], None,
         [[0] * 15 + [1], [0] * 13 + [1] * 3, [0] * 16],
         [[X] * 3 + label + [X], [X] + label + [X] * 3, [X] * 4 + label])


def test_emu3_mmu():
    """BOS system image question assistant answer EOS [PAD..]; the answer and its end are shifted
    labels.
    """
    image = [10, 4, 11, 15, 16, 12, 17, 19, 12, 13, 14]
    same(emu3().mmu(["a", "", ""], ["b", "", "c"], PICTURE.repeat(3, 1, 1)),
         [[8, 5, *image, 0, 6, 1, 9], [8, 5, *image, 6, 9, 7, 7], [8, 5, *image, 6, 2, 9, 7]], None,
         [[0] * 17, [0] * 15 + [1] * 2, [0] * 16 + [1]],
         [[X] * 14 + [1, 9, X], [X] * 13 + [9] + [X] * 3, [X] * 13 + [2, 9, X, X]])


def test_several_turns_on_one_picture():
    """Questions and answers as lists: question answer eot question answer eot ..; every answer
    and end is a label.
    """
    batch = showo((1, 1), 8).mmu([["a", "b b"], "a"], [["c", "d"], "c"], torch.tensor([[[3]], [[0]]]))
    same(batch, [[12, 7, 19, 8, 4, 0, 2, 5, 1, 1, 3, 5], [12, 7, 16, 8, 4, 0, 2, 5, 6, 6, 6, 6]],
         [[1] * 4 + [0] * 8] * 2, [[0] * 12, [0] * 8 + [1] * 4],
         [[X] * 5 + [2, 5, X, X, 3, 5, X], [X] * 5 + [2, 5] + [X] * 5])
    batch = emu3((1, 1), 7, "1*1").mmu([["a", "b"]], [["c", "d"]], torch.tensor([[[3]]]))
    same(batch, [[8, 5, 10, 4, 11, 18, 12, 13, 14, 0, 6, 2, 9, 1, 6, 3, 9]], None, [[0] * 17],
         [[X] * 10 + [2, 9, X, X, 3, 9, X]])
    for tokens in (showo((1, 1), 8), emu3((1, 1), 8, "1*1")):
        one, many = (tokens.mmu(q, a, torch.tensor([[[3]]])) for q, a in ((["a"], ["b"]), ([["a"]], [["b"]])))
        assert torch.equal(one.ids, many.ids) and torch.equal(one.labels, many.labels)


def test_emu3_lm():
    """BOS text EOS [PAD..]; all of it is labelled, shifted."""
    same(emu3().lm(["a b", "", "a b c"]), [[8, 0, 1, 9, 7], [8, 9, 7, 7, 7], [8, 0, 1, 2, 9]], None,
         [[0, 0, 0, 0, 1], [0, 0, 1, 1, 1], [0] * 5], [[0, 1, 9, X, X], [9, X, X, X, X], [0, 1, 2, 9, X]])


@pytest.mark.parametrize("h, w", [(1, 1), (1, 3), (3, 1), (1, 2), (2, 1)])
def test_thin_grids(h, w):
    """Grids of one row, one column and one code, in both dialects, to the last id."""
    codes = torch.arange(h * w).view(1, h, w)
    tokens = showo((h, w), 3)
    image = [7, *range(16, 16 + h * w), 8]
    same(tokens.t2i(["a"], codes), [[11, 4, 0, 5, *image]], [[0] * 4 + [1] * len(image)], [[0] * (4 + len(image))],
         [[X] * 5 + image[1:-1] + [X]])
    assert tokens.mmu([""], ["a"], codes).ids.tolist() == [[12, *image, 4, 0, 5]]
    tokens = emu3((h, w), 1, f"{h}*{w}")
    lines = [i for y in range(h) for i in (*range(15 + y * w, 15 + y * w + w), 12)]
    batch = tokens.t2i(["a"], codes)
    assert batch.ids.tolist() == [[8, 0, 10, 4, 11, *lines, 13, 14, 9]]
    assert batch.labels.tolist() == [[X] * 4 + [i if i >= 15 else X for i in lines] + [X] * 4]
    assert tokens.mmu([""], [""], codes).ids.tolist() == [[8, 5, 10, 4, 11, *lines, 13, 14, 6, 9]]


@given(st.sampled_from([showo, emu3]), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), seeds)
def test_image_ids_and_back(make, B, h, w, seed):
    """codes(image_ids(x)) == x for every grid; also for a slice of a longer sequence."""
    tokens = make((h, w))
    codes = torch.randint(5, (B, h, w), generator=torch.Generator().manual_seed(seed))
    ids = tokens.image_ids(codes)
    assert ids.shape == (B, h * (w + (make is emu3))) and torch.equal(tokens.codes(ids), codes)
    longer = torch.cat((torch.zeros(B, 2).long(), ids, torch.zeros(B, 1).long()), 1)
    assert torch.equal(tokens.codes(longer[:, 2:-1]), codes) and tokens.n_image == h * w


@given(st.sampled_from([showo, emu3]), st.lists(st.text("abcd", max_size=3), min_size=1, max_size=4), seeds)
def test_batches_agree_with_their_rows(make, texts, seed):
    """A batch has the promised length for every task, and its rows are what each sample gives
    alone.
    """
    tokens, texts = make(), [" ".join(text) for text in texts]
    codes = torch.randint(5, (len(texts), 2, 2), generator=torch.Generator().manual_seed(seed))
    blank = [""] * len(texts)
    for task, call in (("t2i", lambda t, c: tokens.t2i(t, c)), ("lm", lambda t, c: tokens.lm(t)),
                       ("mmu", lambda t, c: tokens.mmu(blank[:len(t)], [x[:3] for x in t], c))):
        batch = call(texts, codes)
        assert batch.ids.shape == (len(texts), tokens.length(task))
        for i in range(len(texts)):
            alone = call(texts[i:i + 1], codes[i:i + 1])
            assert all(a is b is None or torch.equal(a, b[i:i + 1]) for a, b in zip(alone, batch))


@pytest.mark.parametrize("tokens", [showo(), emu3()], ids=["showo", "emu3"])
def test_prompts_are_the_start_of_the_sequences(tokens):
    """t2i_prompt and mmu_prompt, which generation feeds, are what training sequences begin with."""
    batch = tokens.t2i(["a b"], PICTURE)
    row = batch.ids[0][batch.valid[0]].tolist()
    start = row.index(tokens.image_start)
    assert tokens.t2i_prompt("a b") == row[:start] and tokens.codes(
        torch.tensor([row[start:start + tokens.image_ids(PICTURE).shape[1]]])).tolist() == PICTURE.tolist()
    prompt = tokens.mmu_prompt("a", tokens.image_ids(PICTURE)[0].tolist())
    full = tokens.mmu(["a"], ["b"], PICTURE)
    row = full.ids[0][full.valid[0]].tolist()
    assert row == [*prompt, *tokens.text.encode("b"), tokens.eot]


def test_batch_carries_the_models_arguments():
    """inputs() are ids, spans and valid; to() keeps None."""
    batch = showo().lm(["a"])
    assert set(batch.inputs()) == {"ids", "spans", "valid"} and batch.inputs()["ids"] is batch.ids
    assert batch.to("cpu").spans is None and torch.equal(batch.to("cpu").labels, batch.labels)



@pytest.mark.parametrize("tokens, call, most", [
    (showo(), lambda t, n: t.t2i([" ".join("a" * n)], PICTURE), 3),  # with sot and eot: 5
    (showo(), lambda t, n: t.mmu([" ".join("a" * (n - 1))], ["b"], PICTURE), 3),
    (showo(text_length=7), lambda t, n: t.mmu([["a", " ".join("a" * n)]], [["b", ""]], PICTURE), 2),
    (showo(), lambda t, n: t.lm([" ".join("a" * n)]), 10),
    (emu3(), lambda t, n: t.t2i([" ".join("a" * n)], PICTURE), 3),
    (emu3(), lambda t, n: t.mmu([" ".join("a" * (n - 1))], ["b"], PICTURE), 2),  # with EOS: 3
    (emu3(), lambda t, n: t.lm([" ".join("a" * n)]), 3)])
def test_text_budget(tokens, call, most):
    """Text that fills the budget exactly passes without padding; one token more is a ValueError
    naming both sizes.
    """
    batch = call(tokens, most)
    assert batch.valid is None or batch.valid.all()
    with pytest.raises(ValueError, match=r"\d+ tokens.*budget of \d+"):
        call(tokens, most + 1)


@pytest.mark.parametrize("make", [showo, emu3])
@pytest.mark.parametrize("call, word", [
    (lambda t: t.t2i(["a"], torch.zeros(1, 2, 3).long()), "grid"),
    (lambda t: t.mmu(["a"], ["b"], torch.zeros(1, 4, 1).long()), "grid"),
    (lambda t: t.image_ids(torch.full((1, 2, 2), 5)), "codes"), (lambda t: t.image_ids(-PICTURE), "codes"),
    (lambda t: t.t2i(["a e"], PICTURE), "'e'"), (lambda t: t.lm(["e"]), "'e'")])
def test_layout_errors(make, call, word):
    """Codes of another grid or outside the codebook and unknown words are ValueErrors that say
    which.
    """
    with pytest.raises(ValueError, match=word):
        call(make())


@pytest.mark.parametrize("make", [showo, emu3])
def test_sizes_that_cannot_be(make):
    """A grid or a text budget below 1 is refused, and so is the length of no task."""
    for wrong in (dict(grid=(0, 3)), dict(text_length=0)):
        with pytest.raises(ValueError, match=r"grid must be \(rows, columns\) and text_length a length, .*, got "):
            make(**wrong)
    with pytest.raises(ValueError, match="unknown task 'x', the tasks are t2i, mmu, lm"):
        make().length("x")


@pytest.mark.parametrize("make", [showo, emu3])
def test_a_model_of_these_sizes_has_room_for_an_answer(make):
    """max_length holds the longest sequence of training, and a text budget of answer behind it."""
    sizes = make().sizes()
    assert sizes["max_length"] - max(make().length(task) for task in ("t2i", "mmu")) == make().text_length


@pytest.mark.parametrize("call", [
    lambda t: t.t2i(["a", "b"], PICTURE), lambda t: t.t2i(["a"], PICTURE.repeat(2, 1, 1)),
    lambda t: t.mmu(["a", "b"], ["a", "b"], PICTURE), lambda t: t.mmu(["a"], ["a", "b"], PICTURE),
    lambda t: t.mmu(["a"], ["b"], PICTURE.repeat(2, 1, 1)), lambda t: t.mmu([["a"]], [["", ""]], PICTURE),
    lambda t: t.mmu([["", ""]], [["a"]], PICTURE)])
def test_mismatched_counts(call):
    """As many captions, questions and answers as pictures, or a ValueError: none is dropped in
    silence.
    """
    for tokens in (showo(), emu3()):
        with pytest.raises(ValueError):
            call(tokens)


@pytest.mark.parametrize("tokens", [showo(), emu3()], ids=["showo", "emu3"])
@pytest.mark.parametrize("call, message", [
    (lambda t: t.lm("a b"), "must be lists of the same length, of one sample or more, got a str"),
    (lambda t: t.lm([]), "got 0"),
    (lambda t: t.t2i("a", PICTURE), "got 1, a str"),
    (lambda t: t.t2i(["a", "b"], PICTURE), "got 1, 2"),
    (lambda t: t.t2i([], PICTURE[:0]), "got 0, 0"),
    (lambda t: t.mmu(["a"], ["b", "c"], PICTURE), "got 1, 1, 2"),
    (lambda t: t.mmu([["a", "b"]], [["c"]], PICTURE), "got 2, 1"),
    (lambda t: t.mmu([[]], [[]], PICTURE), "got 0, 0"),
    (lambda t: t.t2i(["a"], PICTURE.float()), r"image codes must be long \(B, h, w\), got torch.float32 \(1, .*: .long\(\)"),
    (lambda t: t.name(999), "no id 999: this tokenizer has 0 to"),
])
def test_what_is_no_sample(tokens, call, message):
    """Bare strings, unequal numbers, nothing at all, codes that are no integers: ValueError, not
    a batch of letters.
    """
    with pytest.raises(ValueError, match=message):
        call(tokens)


def test_a_palette_of_shares():
    """Patches between 0 and 1 would all be black; whole numbers of any type are pixels."""
    with pytest.raises(ValueError, match="patches must be whole numbers from 0 to 255"):
        Palette(torch.full((1, 2, 2, 3), 0.5))
    assert Palette(torch.full((1, 2, 2, 3), 255.0)).patches.unique().tolist() == [255]


def test_unknown_backbone():
    """A backbone that is neither is a ValueError naming both."""
    with pytest.raises(ValueError, match="showo or emu3.*'llama'"):
        Tokenizer("llama", WordText("ab"), Codes(2), (1, 1), 4)


def test_emu3_needs_words_for_its_header():
    """A word list without the picture's size fails at once with the missing word, not in the
    middle of training.
    """
    with pytest.raises(ValueError, match=r"'2\*2'"):
        Tokenizer("emu3", WordText("ab"), Codes(5), (2, 2), 4, system="", assistant="").t2i(["a"], PICTURE)


@pytest.mark.parametrize("backbone", ("showo", "emu3"))
@pytest.mark.parametrize("text", (ByteText(), WordText("a b c 2*2 USER: ASSISTANT:".split())))
@pytest.mark.parametrize("codec", ("palette", "nearest", "lfq"))
def test_a_tokenizer_comes_back_from_its_state(backbone, text, codec, tmp_path):
    """state() survives torch.save with weights_only, and from_state gives the same sequences to the
    last id and the same codes and pictures, without touching the global generator.
    """
    patches = torch.randint(256, (5, 2, 2, 3), dtype=torch.uint8)
    image = Palette(patches) if codec == "palette" else VQ(8, patch=2, width=4, quantizer=codec)
    one = Tokenizer(backbone, text, image, (2, 2), 20, "USER:", "ASSISTANT:")
    torch.save(one.state(), tmp_path / "t.pt")
    before = torch.get_rng_state()
    two = Tokenizer.from_state(torch.load(tmp_path / "t.pt", weights_only=True))
    assert torch.equal(torch.get_rng_state(), before)
    codes = torch.tensor([[[0, 1], [2, 4]]])
    batches = [tokenizer.t2i(["a b"], codes) + tokenizer.mmu(["a"], ["c"], codes) for tokenizer in (one, two)]
    for a, b in zip(*batches, strict=True):
        assert a is b is None or torch.equal(a, b)
    pictures = torch.randint(256, (3, 4, 4, 3), dtype=torch.uint8)
    assert torch.equal(two.image.decode(codes), image.decode(codes)) and two.vocab_size == one.vocab_size
    assert torch.equal(two.image.encode(pictures), image.encode(pictures))


def test_a_state_is_a_copy():
    """Training a VQ further does not reach into a state that was taken before."""
    tokenizer = Tokenizer("showo", ByteText(), VQ(8, patch=2, width=4), (2, 2), 20)
    state = tokenizer.state()
    before = {name: x.clone() for name, x in state["vq"]["weights"].items()}
    with torch.no_grad():
        for weight in tokenizer.image.parameters():
            weight.add_(1)
    assert before and all(torch.equal(x, state["vq"]["weights"][name]) for name, x in before.items())


def test_a_foreign_codec_cannot_be_stored():
    """A codec that is not of this package cannot be stored: a ValueError names it."""
    with pytest.raises(ValueError, match="can be stored, not a Codes: save its weights apart"):
        Tokenizer("emu3", WordText(["2*2"]), Codes(5), (2, 2), 5).state()


@pytest.mark.parametrize("backbone", ("showo", "emu3"))
@given(budget=st.integers(3, 9), data=st.data())
def test_room_is_what_the_layouts_take(backbone, budget, data):
    """A sample of room(task) text ids is laid out, question and answer in any proportion; one
    more is refused.
    """
    words = WordText("a b 2*2 USER: ASSISTANT:".split())
    tokenizer = Tokenizer(backbone, words, Codes(5), (2, 2), budget, "USER:", "ASSISTANT:")
    for task in ("t2i", "mmu", "lm"):
        room = tokenizer.room(task)
        asked = data.draw(st.integers(0, room)) if task == "mmu" else room
        lay_out = {"t2i": lambda q, a: tokenizer.t2i(["a " * q], PICTURE), "lm": lambda q, a: tokenizer.lm(["a " * q]),
                   "mmu": lambda q, a: tokenizer.mmu(["a " * q], ["b " * a], PICTURE)}[task]
        assert lay_out(asked, room - asked).ids.shape == (1, tokenizer.length(task))
        with pytest.raises(ValueError, match="over the budget"):
            lay_out(asked + 1, room - asked)

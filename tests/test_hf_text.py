"""pretrained.HFText: the text tokenizers of Show-o and Emu3, and with them the published sequences
to the last id.

The ids are those of showlab/Show-o (training/prompting_utils.py) and baaivision/Emu3
(emu3/mllm/tokenization_emu3.py, processing_emu3.py). A stand-in has the sizes of the published
tokenizers; where transformers is installed, small ones that it trains itself come beside it.
"""
import json
import sys

import numpy as np
import pytest
import torch

from helpers import tiny
from unimod_mini import (ByteText, Codes, HFText, ModelConfig, Palette, Plan, Tokenizer,
                         UnifiedTransformer, generate_text)
from unimod_mini.data import prepare
from unimod_mini.data.shards import Shards, text_ids, tokenizer_hash
from unimod_mini.draw_and_ask import kept_tokens
from unimod_mini.tokenizer import IGNORE

END = "<|endoftext|>"
EXTRAS = [END, "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)), "<|image token|>",
          "<|image start|>", "<|image end|>"]


class StandIn:
    """Letters and signs as ids from 0, special tokens where the published tokenizers have them;
    `pairs` are merged.
    """
    pairs = ("?.",)

    def __init__(self, specials: dict, size: int, **names):
        self.specials, self.size = specials, size
        self.bos_token = self.eos_token = self.unk_token = self.unk_token_id = None
        vars(self).update(names)

    def __len__(self):
        return self.size

    def convert_tokens_to_ids(self, token):
        return self.specials.get(token, self.unk_token_id)

    def encode(self, text, add_special_tokens):
        assert add_special_tokens is False
        ids = []
        while text:
            merged = text[:2] in self.pairs
            ids.append(1000 + self.pairs.index(text[:2]) if merged else ord(text[0]))
            text = text[1 + merged:]
        return ids

    def decode(self, ids, skip_special_tokens, clean_up_tokenization_spaces):
        # "a ?" must come back
        assert skip_special_tokens is True and clean_up_tokenization_spaces is False
        hidden = set(self.specials.values())
        return "".join(self.pairs[i - 1000] if i >= 1000 else chr(i) for i in ids if i not in hidden)


def phi():
    return StandIn({END: 50256}, 50295, bos_token=END, eos_token=END, unk_token=END, unk_token_id=50256)


def emu3():
    specials = {token: 151643 + i for i, token in enumerate(EXTRAS)} | {"<|visual token 000000|>": 151854}
    return StandIn(specials, 151854 + 32768)


def tokenizer(backbone, grid=(1, 2), text_length=8):
    text = HFText({"showo": phi, "emu3": emu3}[backbone](), backbone)
    return Tokenizer(backbone, text, Codes({"showo": 8192, "emu3": 32768}[backbone]), grid, text_length)


def ids(text):
    return [ord(letter) for letter in text]



@pytest.mark.parametrize("backbone, preset", [("showo", "showo-1.3b"), ("emu3", "emu3-8b")])
def test_the_vocabulary_is_the_published_one(backbone, preset):
    """Vocabulary and first image code are those of the true sizes; Show-o's mask is the last id."""
    tokens, config = tokenizer(backbone), ModelConfig.preset(preset)
    assert (tokens.vocab_size, tokens.image_start) == (config.vocab_size, config.image_start)
    assert tokens.mask_id == (58497 if backbone == "showo" else None)


def test_showo_special_ids():
    """[PAD] and nine more behind Phi's 50,295 ids; sot and eot are both Phi's end of text."""
    assert tokenizer("showo").special == {
        "sot": 50256, "eot": 50256, "[PAD]": 50295, "soi": 50296, "eoi": 50297, "sov": 50298, "eov": 50299,
        "t2i": 50300, "mmu": 50301, "t2v": 50302, "v2v": 50303, "lvg": 50304}


def test_emu3_special_ids():
    """Emu3's are extra tokens of its own vocabulary; none is added behind it."""
    assert tokenizer("emu3").special == {"[PAD]": 151643, "BOS": 151849, "EOS": 151850, "boi": 151852, "img": 151851,
                                         "EOL": 151846, "EOF": 151847, "eoi": 151853}


def test_showo_sequences():
    """Padded on the left to draw, on the right to answer; task token, text between two ends, the
    picture in its marks.
    """
    tokens, picture = tokenizer("showo", text_length=6), torch.tensor([[[0, 8191]]])
    t2i, mmu, lm = tokens.t2i(["fox"], picture), tokens.mmu(["a?"], ["b"], picture), tokens.lm(["fox"])
    codes = [50296, 50305, 58496, 50297]
    assert t2i.ids.tolist() == [[50295, 50300, 50256, *ids("fox"), 50256, *codes]]
    assert t2i.labels[0, -3:-1].tolist() == [50305, 58496] and (t2i.labels[0, :-3] == IGNORE).all()
    assert mmu.ids.tolist() == [[50301, *codes, 50256, *ids("a?b"), 50256, 50295]]
    assert mmu.labels[0].tolist() == [IGNORE] * 7 + [ord("b"), 50256, IGNORE, IGNORE]
    assert lm.ids.tolist() == [[50256, *ids("fox"), 50256, *[50295] * 6]]
    assert t2i.valid.tolist() == [[False] + [True] * 10] and mmu.valid.tolist() == [[True] * 10 + [False]]


def test_emu3_sequences():
    """The question goes on into ".

    ASSISTANT:" as one text, so that a merge across the seam is the published one.
    """
    tokens, picture = tokenizer("emu3", grid=(2, 1)), torch.tensor([[[0], [32767]]])
    image = [151852, *ids("2*1"), 151851, 151854, 151846, 184621, 151846, 151847, 151853]
    t2i, mmu = tokens.t2i(["fox"], picture), tokens.mmu(["a?"], ["b"], picture)
    row = [151849, *ids("fox"), *image, 151850]
    assert t2i.ids.tolist() == [row + [151643] * (tokens.length("t2i") - len(row))]
    row = [151849, *ids("You are a helpful assistant. USER: "), *image, ord("a"), 1000, *ids(" ASSISTANT:b"), 151850]
    assert mmu.ids.tolist() == [row + [151643] * (tokens.length("mmu") - len(row))]
    assert tokens.mmu_prompt("a?", image[5:9]) == row[:-2]


@pytest.mark.parametrize("backbone", ["showo", "emu3"])
def test_names_and_texts(backbone):
    """Every special id has its name (sot and eot share one); text comes back without special ids
    and image codes.
    """
    tokens = tokenizer(backbone)
    for name, i in tokens.special.items():
        assert tokens.name(i) == ("eot" if name == "sot" else name)
    assert tokens.name(tokens.image_start + 5) == "<5>" and tokens.name(ord("a")) == "a"
    assert tokens.text.decode([-1, *ids("fox"), tokens.eot, tokens.pad, tokens.image_start]) == "fox"
    with pytest.raises(ValueError, match=f"no id {tokens.vocab_size}"):
        tokens.name(tokens.vocab_size)


@pytest.mark.parametrize("text, backbone, message", [
    (phi, "emu3", r"not that of emu3, it lacks BOS \(<\|extra_203\|>\).*image codes \(<\|visual token 000000"),
    (emu3, "showo", r"not that of showo, it lacks sot \(None\), eot \(None\)"),
    (lambda: StandIn({END: 3, "[PAD]": 4}, 5, bos_token=END, eos_token=END), "showo", r"has a \[PAD\] already"),
    (phi, "llama", "backbone must be showo or emu3, got 'llama'"),
])
def test_another_tokenizer_is_refused(text, backbone, message):
    """Of another model, with tokens that were added before, for no backbone: one line says what
    is wrong.
    """
    with pytest.raises(ValueError, match=message):
        HFText(text(), backbone)


@pytest.mark.parametrize("backbone, question", [("showo", "USER: \nfox? ASSISTANT:"), ("emu3", "fox?")])
def test_chat(backbone, question):
    """Show-o's question as its inference_mmu.py asks it; Emu3's layout asks by itself; a blank
    before an answer.
    """
    text = tokenizer(backbone).text
    assert text.chat("fox?", "yes") == (question, " yes") and text.chat("fox?")[0] == question


@pytest.mark.parametrize("backbone, said", [("showo", "fox"), ("emu3", "fox1*2")])
def test_kept_words_are_words(backbone, said):
    """--explain shows the text of a sequence: no special token, though some lie among the
    tokenizer's own ids.
    """
    tokens = tokenizer(backbone)
    sizes = tiny(backbone, vocab_size=tokens.vocab_size, image_start=tokens.image_start)
    model = UnifiedTransformer(sizes, Plan({"t2i": (1, .5, 1)}))
    pictures, _, (text,) = kept_tokens(model, tokens, tokens.t2i(["fox"], torch.tensor([[[0, 1]]])), "t2i", "topk")
    assert [word.strip("[]") for word in text.split()] == list(said) and pictures.shape == (1, 1, 2, 3)


def test_a_text_is_counted_as_it_is_laid_out():
    """The merge across the seam counts: three letters and a mark are one id less with ".

    ASSISTANT:" behind them.
    """
    tokens = tokenizer("emu3", text_length=4)
    assert tokens.room("mmu") == 3
    for question, answer, fits in (("abc", "", True), ("abc?", "", True), ("abcd", "", False), ("ab?", "b", True),
                                   ("abc?", "b", False)):
        lay_out = lambda: tokens.mmu([question], [answer], torch.tensor([[[0, 1]]]))
        for check in (lambda: tokens.check_text("mmu", question, answer), lay_out):
            if fits:
                check()
            else:
                with pytest.raises(ValueError, match="over the budget"):
                    check()


def test_texts_that_do_not_come_back(monkeypatch):
    """A record keeps ids and the loader reads texts: one whose ids do not give it back is
    refused, not changed.
    """
    tokens = tokenizer("showo")
    assert text_ids(tokens, "mmu", "fox", "a") == (tuple(ids("fox")), tuple(ids("a")))
    encode = tokens.text.tokenizer.encode
    monkeypatch.setattr(tokens.text.tokenizer, "encode", lambda text, **more: [
        i for part in text.replace(END, "\0").split("\0") for i in (50256, *encode(part, **more))][1:])
    with pytest.raises(ValueError, match=r"the ids of 'a<\|endoftext\|>b' give back 'ab': is a special token in it"):
        text_ids(tokens, "mmu", "fox", f"a{END}b")
    # a tokenizer without letters
    monkeypatch.setattr(tokens.text.tokenizer, "encode", lambda text, **more: [])
    with pytest.raises(ValueError, match=r"the ids of 'fox' give back ''"):
        text_ids(tokens, "t2i", "fox", "")


@pytest.mark.parametrize("question, back", [("A Fox", "a fox"), ("ﬁve  ½", "five 1⁄2"), ("", ""), (" ", "")])
def test_case_blanks_and_forms_of_unicode_may_change(monkeypatch, question, back):
    """What a tokenizer's normaliser does to a text is no reason to leave it out."""
    tokens = tokenizer("showo")
    monkeypatch.setattr(tokens.text, "decode", lambda ids: back)
    monkeypatch.setattr(tokens.text, "encode", lambda text: [1, 2])
    assert text_ids(tokens, "t2i", question, back) == ((1, 2), (1, 2))


def test_what_is_no_unicode():
    """A lone surrogate, from broken JSON or a command line, is a ValueError, as in ByteText."""
    for text in (tokenizer("showo").text, ByteText()):
        with pytest.raises(ValueError, match="surrogates not allowed"):
            text.encode("bad \ud800 text")


def test_the_backbones_must_be_the_same():
    """Show-o's texts in Emu3's layouts could be stored and never read back."""
    with pytest.raises(ValueError, match="the text tokenizer is that of showo, not of emu3"):
        Tokenizer("emu3", HFText(phi(), "showo"), Codes(5), (2, 2), 9)


def test_a_slow_tokenizer_cannot_be_stored():
    """It has no tokenizer.json."""
    with pytest.raises(ValueError, match="a StandIn cannot be stored: take a fast tokenizer"):
        tokenizer("showo").state()



@pytest.fixture
def trained():
    """A byte-level BPE of 300 ids, with the special tokens of a backbone."""
    transformers = pytest.importorskip("transformers")
    library = pytest.importorskip("tokenizers")

    def make(backbone):
        bpe = library.Tokenizer(library.models.BPE())
        bpe.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = library.decoders.ByteLevel()
        specials = [END] if backbone == "showo" else [*EXTRAS, *(f"<|visual token {i:06d}|>" for i in range(4))]
        trainer = library.trainers.BpeTrainer(vocab_size=300, initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet())
        bpe.train_from_iterator(["what is this?. a red fox and a red ring"] * 9, trainer)
        bpe.add_special_tokens(specials)
        ends = {"bos_token": END, "eos_token": END, "unk_token": END} if backbone == "showo" else {}
        return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, **ends)
    return make


@pytest.mark.parametrize("backbone", ["showo", "emu3"])
def test_a_tokenizer_of_transformers(trained, backbone):
    """Text comes back, special and image ids do not overlap it, and a model of that vocabulary
    answers.
    """
    text = HFText(trained(backbone), backbone)
    palette = Palette(torch.zeros(4, 2, 2, 3, dtype=torch.uint8))
    tokens = Tokenizer(backbone, text, palette, (2, 2), 24)
    assert text.decode(text.encode("what is this? a red fox, größer")) == "what is this? a red fox, größer"
    assert tokens.image_start == (len(text.tokenizer) + 10 if backbone == "showo" else len(text.tokenizer) - 4)
    assert max(text.encode("a red fox")) < min(i for name, i in tokens.special.items() if name != "[PAD]")
    batch = tokens.mmu(["what is this?"], ["a fox"], torch.tensor([[[0, 1], [2, 3]]]))
    if backbone == "emu3":                                 # the merge of "?." is in it
        seam = text.encode("?.")
        assert len(seam) == 1 and seam[0] in batch.ids[0].tolist()
    config = tiny(backbone, vocab_size=tokens.vocab_size, image_start=tokens.image_start, max_length=120)
    answer = generate_text(UnifiedTransformer(config), tokens, torch.zeros(4, 4, 3, dtype=torch.uint8), "what is this?")
    assert isinstance(answer, str)


@pytest.mark.parametrize("backbone", ["showo", "emu3"])
def test_it_is_stored_in_a_data_set(trained, tmp_path, monkeypatch, backbone):
    """prepare --text FOLDER: the tokenizer lies in the data set and gives the ids of the one in the
    folder; questions are asked as the published weights know them, and text with a special token is
    left out by name.
    """
    hf = trained(backbone)
    hf.save_pretrained(tmp_path / "hf")
    (tmp_path / "a").mkdir()
    texts = ["a red fox", "größer ?  , 's", f"a {END} b"]
    for i, text in enumerate(texts):
        np.save(tmp_path / "a" / f"{i}.npy", np.arange(4).reshape(2, 2))
    (tmp_path / "a" / "metadata.jsonl").write_text("\n".join(
        json.dumps({"file_name": f"{i}.npy", "text": text}) for i, text in enumerate(texts)))
    given = [tmp_path / "a", tmp_path / "out", "--image", "codes", "--codes", 4, "--size", 2, "--held", 0, "--workers", 1,
             "--backbone", backbone]
    run = lambda *more: prepare.main(list(map(str, more)))
    run(*given, "--text", tmp_path / "hf")
    shards, text = Shards(tmp_path / "out"), HFText(hf, backbone)
    tokens, own = shards.tokenizer, Tokenizer(backbone, text, Codes(4), (2, 2), 128)
    assert (tokens.special, tokens.vocab_size, tokens.image_start) == (own.special, own.vocab_size, own.image_start)
    for string in (*texts, "what is this?. ASSISTANT:", "\n\t  x <|extra_203|>"):
        assert tokens.text.encode(string) == text.encode(string)
        assert tokens.text.decode(text.encode(string)) == text.decode(text.encode(string))
    rows = [shards.sample("mmu", i) for i in range(shards.count("mmu"))]
    wanted = [text.chat("Please describe this image.", x) for x in texts[:2]]
    assert [shards.texts(row) for row in rows] == wanted
    for row, (question, answer) in zip(rows, wanted):  # what training sees is the text's own layout
        one = tokens.mmu([row.question], [row.answer], row.codes[None])
        two = own.mmu([question], [answer], row.codes[None])
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(one, two))
    drawn = [shards.sample("t2i", i) for i in range(shards.count("t2i"))]
    assert [shards.texts(row)[0] for row in drawn] == texts[:2]
    assert (tmp_path / "out" / "skipped.txt").read_text().count("give back") == 2
    run(*given, "--text", tmp_path / "hf" / ".." / "hf")  # the same folder: finished
    monkeypatch.setitem(sys.modules, "transformers", None)
    for read in (lambda: Shards(tmp_path / "out"), lambda: prepare.load_codec(tmp_path / "out" / "tokenizer.pt")):
        with pytest.raises(ImportError, match="pip install transformers"):
            read()


@pytest.mark.parametrize("backbone", ["showo", "emu3"])
def test_a_state_outlives_versions_and_use(trained, backbone):
    """What was stored is stored again, though this version of transformers would write it otherwise
    and a call may switch stored truncation and padding off.
    """
    hf = trained(backbone)
    hf.backend_tokenizer.enable_truncation(3)
    tokens = Tokenizer(backbone, HFText(hf, backbone), Codes(4), (2, 2), 20)
    state = tokens.state()
    state["hf"] = state["hf"] | {"json": json.dumps(json.loads(state["hf"]["json"]) | {"post_processor": None})}
    again = Tokenizer.from_state(state)
    assert len(again.text.encode("what is this red fox")) > 3
    assert again.state() == state and tokenizer_hash(again) == tokenizer_hash(Tokenizer.from_state(state))
    assert again.text.tokenizer.backend_tokenizer.to_str() != state["hf"]["json"]


@pytest.mark.parametrize("file, content", [("x", ""), ("tokenizer.json", "{}"), ("tokenizer_config.json", "[]"),
                                           ("config.json", '{"model_type": "phi", "architectures": ["PhiForCausalLM"]}')])
def test_what_is_no_tokenizer(tmp_path, file, content):
    """An empty folder, broken files, and weights without a tokenizer, of which transformers
    makes an empty one.
    """
    pytest.importorskip("transformers")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / file).write_text(content)
    with pytest.raises(ValueError, match="folder is no tokenizer of Hugging Face: "):
        HFText.from_pretrained(str(tmp_path / "folder"), "showo")


def test_without_transformers(monkeypatch):
    """The error names the pip command."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="pip install transformers"):
        HFText.from_pretrained("microsoft/phi-1_5", "showo")

"""This code beside the authors' own: sequences, logits, drawings and answers of Show-o, ids and
logits of Emu3.

Clones of three repositories in one folder, and a Transformers that their code still imports:

    mkdir published && cd published for name in showlab/Show-o baaivision/Emu3 baaivision/Emu3.5; do
    git clone https://github.com/$name; done && cd .. pip install transformers==4.48.3 tiktoken
    pillow PUBLISHED=published python -m pytest tests/test_published_code.py

Passed with their commits 45a5a2d, f6ea9aa and 8fcf1da. The weights are random and small, the
vocabularies a byte-level one (Show-o) and the published one (Emu3; its file lies in Emu3.5).
Show-o's wrapper needs no diffusers here: its mixins hold nothing that is compared.
"""
import importlib
import inspect
import os
import sys
import types
import unicodedata
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st

from helpers import build, tiny
from unimod_mini import (Codes, HFText, Tokenizer, UnifiedTransformer, generate, generate_image,
                         generate_text)
from unimod_mini.weights.pretrained import their_names

PUBLISHED = Path(os.environ.get("PUBLISHED", ""))
pytestmark = pytest.mark.skipif("PUBLISHED" not in os.environ, reason="needs clones of Show-o, Emu3 and Emu3.5")

END, TEXT_LENGTH, GRID = "<|endoftext|>", 128, (4, 4)
N = GRID[0] * GRID[1]
short = st.text(st.characters(codec="utf-8", exclude_characters="<"), max_size=10)


def published(folder: Path, name: str, **stubs):
    """A module of a clone, imported under a package of our own; stubs stand in for its
    neighbours.
    """
    package = f"published_{folder.name}"
    sys.modules.setdefault(package, types.ModuleType(package)).__path__ = [str(folder)]
    for neighbour, content in stubs.items():
        sys.modules[f"{package}.{neighbour}"] = types.SimpleNamespace(**content)
    return importlib.import_module(f"{package}.{name}")


def give_weights(theirs, ours: UnifiedTransformer):
    """Our weights in their model, which lacks none."""
    state, names = ours.state_dict(), their_names(ours)
    given = theirs.load_state_dict({name: state[our] for name, our in names.items()}, strict=False)
    assert not given.unexpected_keys and all("inv_freq" in name for name in given.missing_keys)
    return theirs.to(ours.head.weight.dtype).eval()


def same(theirs, ours, valid):
    """In float64, but for their rotary angles and their logits, which are float32 in any model."""
    torch.testing.assert_close(ours[valid].float(), theirs[valid].float(), rtol=0, atol=1e-4)



@pytest.fixture(scope="module")
def showo():
    """Their prompting, model and wrapper, and ours, with the same weights."""
    library, hf = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    alphabet = sorted(library.pre_tokenizers.ByteLevel.alphabet())
    bpe = library.Tokenizer(library.models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    bpe.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = library.decoders.ByteLevel()
    bpe.add_special_tokens([END])

    def fresh():  # their prompting adds tokens to the one that it is given
        copy = library.Tokenizer.from_str(bpe.to_str())
        return hf.PreTrainedTokenizerFast(tokenizer_object=copy, bos_token=END, eos_token=END, unk_token=END)

    tokens = Tokenizer("showo", HFText(fresh(), "showo"), Codes(64), GRID, TEXT_LENGTH)
    config = tiny("showo", vocab_size=tokens.vocab_size, image_start=tokens.image_start, max_length=256,
                  rope_theta=1e4)
    ours = build(config, dtype=torch.float64)
    for block in ours.blocks:  # attention that is sharp, so that masked codes differ by place
        block.attention.q_norm.weight.data.mul_(16)

    mixins = dict(ModelMixin=torch.nn.Module, ConfigMixin=object, register_to_config=lambda function: function)
    wrapper = published(PUBLISHED / "Show-o" / "models", "modeling_showo", modeling_utils=mixins)
    prompting = published(PUBLISHED / "Show-o" / "training", "prompting_utils")
    phi = hf.PhiConfig(
        vocab_size=config.vocab_size, hidden_size=config.d_model, intermediate_size=config.d_ff,
        num_hidden_layers=config.n_layer, num_attention_heads=config.n_head, partial_rotary_factor=0.5,
        qk_layernorm=True, max_position_embeddings=config.max_length, rope_theta=1e4, hidden_act="gelu_new")
    model = wrapper.Showo.__new__(wrapper.Showo)
    torch.nn.Module.__init__(model)
    model.showo, model.output_size = give_weights(wrapper.PhiForCausalLM(phi), ours), config.vocab_size
    model.config = types.SimpleNamespace(mask_token_id=tokens.mask_id, w_clip_vit=False)
    prompter = prompting.UniversalPrompting(fresh(), max_text_len=TEXT_LENGTH, cond_dropout_prob=0.0)
    return types.SimpleNamespace(tokens=tokens, ours=ours, model=model, prompting=prompting, prompter=prompter)


def encoded(showo, texts) -> list:
    return [list(ids) for ids in showo.prompter.text_tokenizer(texts)["input_ids"]]


def their_mask(showo, ids, **options):
    marks = {f"{name}_id": int(showo.prompter.sptids_dict[f"<|{name}|>"]) for name in ("pad", "soi", "eoi")}
    return showo.prompting.create_attention_mask_predict_next(ids, **marks, **options).double()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(short, short, short), min_size=1, max_size=3), st.integers(0, 2**32 - 1))
def test_showo_sequences_and_logits(showo, texts, seed):
    """Drawing (half of the codes masked), answering and text: every id, and the logits of every
    valid token.
    """
    tokens, (captions, questions, answers) = showo.tokens, map(list, zip(*texts))
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 64, (len(texts), *GRID), generator=generator)
    hidden = torch.rand(len(texts), N, generator=generator) < 0.5
    picture = codes.flatten(1) + tokens.image_start
    masked = picture.masked_fill(hidden, tokens.mask_id)

    batch = tokens.t2i(captions, codes)
    batch.ids[:, -N - 1:-1] = masked
    t2i = showo.prompter.t2i_prompt(encoded(showo, captions), masked, picture)[0]
    calls = {"t2i": (batch, t2i, their_mask(showo, t2i, rm_pad_in_image=True))}
    pairs = [tokens.text.chat(*pair) for pair in zip(questions, answers)]
    batch = tokens.mmu(*map(list, zip(*pairs)), codes)
    mmu = showo.prompter.mmu_prompt(picture, encoded(showo, ["".join(pair) for pair in pairs]))[0]
    eoi = int(showo.prompter.sptids_dict["<|eoi|>"])
    calls["mmu"] = (batch, mmu, showo.prompting.create_attention_mask_for_mmu(mmu, eoi).double())
    lm = showo.prompter.lm_prompt(encoded(showo, captions), tokens.length("lm"))[0]
    calls["lm"] = (tokens.lm(captions), lm, their_mask(showo, lm))
    for task, (batch, ids, mask) in calls.items():
        assert batch.ids.tolist() == ids.tolist(), task
        with torch.no_grad():
            same(showo.model(ids, attention_mask=mask), showo.ours(**batch.inputs(), task=task).logits, batch.valid)


def test_showo_drawing(showo, monkeypatch):
    """Guided parallel decoding, the likeliest code each time and no noise in which of them stay.

    (Not in 6 steps: after step 4 half of the 16 codes are masked, which their float32 rounds down
    to 7.)
    """
    tokens, prompts = showo.tokens, ["a red fox", "the sea", ""]
    monkeypatch.setattr(torch, "multinomial", lambda p, num_samples, generator=None: p.argmax(-1, keepdim=True))
    monkeypatch.setattr(generate, "CHOICE_NOISE", 0.0)
    empty = torch.full((3, N), tokens.mask_id)
    asked, blank = (showo.prompter.t2i_gen_prompt(encoded(showo, texts), empty)[0] for texts in (prompts, [""] * 3))
    space = types.SimpleNamespace
    sizes = space(num_vq_tokens=N, num_new_special_tokens=10, llm_vocab_size=tokens.image_start - 10)
    config = space(model=space(showo=sizes), dataset=space(preprocessing=space(max_seq_length=TEXT_LENGTH)))
    mask = their_mask(showo, torch.cat((asked, blank)), rm_pad_in_image=True)
    with torch.no_grad():
        theirs = showo.model.t2i_generate(asked, blank, mask, temperature=0.0, timesteps=5, guidance_scale=1.5,
                                          config=config).view(3, *GRID)
    assert len(theirs.unique()) > 5
    for routing in ("causal", "topk"):
        ours = generate_image(showo.ours, tokens, prompts, routing, temperature=0.0, guidance=1.5, steps=5)
        assert ours.tolist() == theirs.tolist()


@pytest.mark.parametrize("question", ["what is it?", "", "größer, or not"])
def test_showo_answers(showo, question):
    """inference_mmu.py's prompt, greedily, to the end."""
    tokens, codes = showo.tokens, torch.arange(N).view(GRID)
    asked, ids = tokens.text.chat(question)[0], showo.prompter.sptids_dict
    marks = [ids[f"<|{name}|>"] for name in ("mmu", "soi", "eoi", "sot")]
    prompt = torch.cat((*marks[:2], codes.flatten() + tokens.image_start, *marks[2:],
                        torch.tensor(encoded(showo, [asked])[0])))[None]
    mask = showo.prompting.create_attention_mask_for_mmu(prompt, int(ids["<|eoi|>"])).double()
    theirs = showo.model.mmu_generate(prompt, attention_mask=mask, max_new_tokens=12, top_k=1, eot_token=tokens.eot)
    for routing in ("causal", "topk"):
        said = generate_text(showo.ours, tokens, codes, asked, routing, max_tokens=12)
        assert said == tokens.text.decode([int(i) for i in theirs if i != tokens.eot])



@pytest.fixture(scope="module")
def emu3(tmp_path_factory):
    """Their tokenizer, slow, and its vocabulary as a fast one behind our Tokenizer."""
    library, hf = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    pytest.importorskip("tiktoken")
    converter = importlib.import_module("transformers.convert_slow_tokenizer").TikTokenConverter
    module = published(PUBLISHED / "Emu3" / "emu3" / "mllm", "tokenization_emu3")
    vocabulary = str(next((PUBLISHED / "Emu3.5").rglob("emu3.tiktoken")))
    visual = [f"<|visual token {i:06d}|>" for i in range(32768)]
    listed = tmp_path_factory.mktemp("emu3") / "emu3_vision_tokens.txt"
    marks = ["<|image token|>", "<|image start|>", "<|image end|>"]
    listed.write_text("\n".join(marks + visual))
    theirs = module.Emu3Tokenizer(vocabulary, str(listed))
    specials = sorted(theirs.special_tokens, key=theirs.special_tokens.get)
    fast = converter(vocabulary, module.PAT_STR, additional_special_tokens=specials).converted()
    fast.normalizer = library.normalizers.NFC()            # as their tokenize does
    text = HFText(hf.PreTrainedTokenizerFast(tokenizer_object=fast), "emu3")
    return types.SimpleNamespace(theirs=theirs, tokens=Tokenizer("emu3", text, Codes(32768), (3, 2), TEXT_LENGTH))


@settings(max_examples=200, deadline=None)
@given(short, st.integers(0, 32767))
def test_emu3_ids(emu3, text, code):
    """The texts, and both prompts of processing_emu3.py around them, by the published
    vocabulary.
    """
    tokens, theirs = emu3.tokens, emu3.theirs
    assert (tokens.vocab_size, tokens.image_start) == (184622, 151854)
    assert tokens.text.encode(text) == theirs.encode(text)
    assert tokens.text.decode(tokens.text.encode(text)) == unicodedata.normalize("NFC", text)
    processing = published(PUBLISHED / "Emu3" / "emu3" / "mllm", "processing_emu3").Emu3Processor
    default = {name: p.default for name, p in inspect.signature(processing.__init__).parameters.items()}
    codes = torch.tensor([[[code, 0], [1, 32767], [2, 3]]])
    self = types.SimpleNamespace(tokenizer=theirs, visual_template=default["visual_template"])
    header = theirs.boi_token + default["prefix_template"].format(H=3, W=2) + theirs.img_token
    image = header + processing.to_imgstr(self, codes[0]) + theirs.eol_token + theirs.eof_token + theirs.eoi_token
    asked = default["chat_template"].format(image_prompt=image, text_prompt=text)
    assert tokens.mmu_prompt(text, tokens.image_ids(codes)[0].tolist()) == theirs.encode(theirs.bos_token + asked)
    assert tokens.t2i_prompt(text) == theirs.encode(theirs.bos_token + text + header)


def test_emu3_logits():
    """Their modeling_emu3.py on our weights, grouped heads among them."""
    folder = PUBLISHED / "Emu3" / "emu3" / "mllm"
    module = published(folder, "modeling_emu3")
    config = tiny("emu3", rope_theta=1e6)
    ours = build(config, dtype=torch.float64)
    sizes = dict(vocab_size=config.vocab_size, hidden_size=config.d_model, intermediate_size=config.d_ff,
                 num_hidden_layers=config.n_layer, num_attention_heads=config.n_head, pad_token_id=0,
                 num_key_value_heads=config.n_kv_head, max_position_embeddings=config.max_length, use_cache=False)
    theirs = give_weights(module.Emu3ForCausalLM(module.Emu3Config(**sizes)), ours)
    ids = torch.randint(0, config.vocab_size, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        same(theirs(ids).logits, ours(ids).logits, torch.ones_like(ids, dtype=torch.bool))

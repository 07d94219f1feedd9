"""unimod_mini.generate: fast decoding against slow twins, with tiny random models in float64."""
import math
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from unimod_mini import generate
from unimod_mini.config import ModelConfig
from unimod_mini.generate import Decoder, generate_image, generate_text, guided, left_pad, sample
from unimod_mini.plan import Plan
from unimod_mini.tokenizer import Palette, Tokenizer, WordText
from unimod_mini.transformer import Output, UnifiedTransformer

BACKBONES, RULES = ("showo", "emu3"), ("topk", "causal")
GRIDS = [(1, 1), (1, 2), (2, 1), (2, 3)]
WORDS = "a b c d e sys asst 1*1 1*2 2*1 2*3 3*3".split()
PLAN = Plan({"t2i": (1, .5, .7, 0, .3), "mmu": (.6, .4, 1, .5, 0), "lm": (1,) * 5})
both = pytest.mark.parametrize("backbone", BACKBONES)
questions = st.lists(st.text("abcde", min_size=1, max_size=4).map(" ".join), min_size=1, max_size=3)


def make(backbone, grid=(2, 3), seed=0, plan=PLAN, positions=0, max_length=64):
    """A tokenizer with six different patches and a random float64 model whose routers disagree
    about the tokens.
    """
    patches = torch.randint(256, (6, 2, 2, 3), generator=torch.Generator().manual_seed(1))
    tokens = Tokenizer(backbone, WordText(WORDS), Palette(patches), grid, 8, system="sys", assistant="asst")
    config = ModelConfig(backbone, plan.n_layer, 2, 2 if backbone == "showo" else 1, 16, 32, tokens.vocab_size,
                         max_length, image_start=tokens.image_start, image_positions=positions,
                         rope_fraction=0.5 if backbone == "showo" else 1.0, qk_norm=backbone == "showo")
    model = UnifiedTransformer(config, plan).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.state_dict().values():         # thresholds too
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=weight.dtype) * 0.4)
    return tokens, model


def pictures(tokens, count, seed=0):
    codes = torch.randint(6, (count, *tokens.grid), generator=torch.Generator().manual_seed(seed))
    return tokens.image.decode(codes)


@torch.no_grad()
def grow(model, row, task, rule, spans=0, count=1, allowed=slice(None), after=lambda n: [], finished=0):
    """Append `count` greedy ids to a row, recomputing everything each time, alone, unpadded and
    without a cache.
    """
    new = []
    for n in range(count):
        ids = torch.tensor([row + new])
        span = (torch.arange(ids.shape[1]) < spans).long()[None] if spans else None
        logits = model(ids, task=task, spans=span, routing=rule, n_future=max(0, finished - ids.shape[1])).logits[0, -1]
        new.append(int(logits[allowed].argmax()) + (allowed.start or 0))
        new += after(n)
    return new


def slow_answer(model, tokens, image, question, rule, steps):
    """generate_text by recomputation."""
    ids = tokens.image_ids(tokens.image.encode(image[None]))[0].tolist()
    new = grow(model, tokens.mmu_prompt(question, ids), "mmu", rule, count=steps,
               spans=tokens.n_image + 3 if tokens.backbone == "showo" else 0)
    return tokens.text.decode(new[:new.index(tokens.eot)] if tokens.eot in new else new)


def slow_rows(model, tokens, prompt, rule):
    """draw_by_row at temperature 0 by recomputation: codes (h, w)."""
    (h, w), line = tokens.grid, tokens.special["EOL"]
    finished = int(tokens.t2i([prompt], torch.zeros(1, h, w, dtype=torch.long)).valid.sum())
    new = grow(model, tokens.t2i_prompt(prompt), "t2i", rule, count=h * w, after=lambda n: [line] * ((n + 1) % w == 0),
               allowed=slice(tokens.image_start, tokens.image_end), finished=finished)
    return torch.tensor([i - tokens.image_start for i in new if i != line]).view(h, w)


@torch.no_grad()
def slow_parallel(model, tokens, prompt, rule, noise):
    """draw_parallel with greedy codes, one prompt, by loops: fill every hole, then hide the least
    confident again.

    noise: (steps, N), what is added to the confidence, before it fades. Returns the image ids at
    the start of every step, and the last ones.
    """
    steps = len(noise)
    N, image, films = tokens.n_image, [None] * tokens.n_image, []
    start = tokens.t2i_prompt(prompt)
    for step in range(1, steps + 1):
        films.append([tokens.mask_id if i is None else i for i in image])
        ids = start + films[-1] + tokens.image_footer()
        spans = torch.tensor([[0] * (len(start) - 1) + [1] * (N + 2)])
        logits = model(torch.tensor([ids]), task="t2i", spans=spans, routing=rule).logits[0, -N - 1:-1]
        logp = logits[:, tokens.image_start:tokens.image_end].log_softmax(-1)
        holes = [n for n in range(N) if image[n] is None]
        for n in holes:
            image[n] = tokens.image_start + int(logp[n].argmax())
        sure = logp.max(1).values + (1 - step / steps) * noise[step - 1]
        hide = min(math.floor(N * math.cos(math.pi / 2 * step / steps)), N - step) if step < steps else 0
        for n in sorted(holes, key=lambda n: float(sure[n]))[:max(0, hide)]:
            image[n] = None
    return films + [image]


def film(model, tokens):
    """Records the image ids that a showo model is fed from now on, (B, N) a forward."""
    seen, original = [], model.forward

    def forward(ids, spans=None, **rest):
        if spans is not None:  # not the prompt, which causal routing prefills once
            seen.append(ids[:, -tokens.n_image - 1:-1].clone())
        return original(ids, spans=spans, **rest)

    model.forward = forward
    return seen


class Script(nn.Module):
    """Stands in for a model: row b says ids[b][0], ids[b][1], ..

    whatever it is fed, and notes what that was.
    """

    def __init__(self, config, ids):
        super().__init__()
        self.config, self.script, self.fed, self.plan = config, ids, [], Plan.dense(config.n_layer)
        self.weight, self.autocast = nn.Parameter(torch.zeros(())), nullcontext

    def forward(self, ids, **_):
        self.fed.append(ids.clone())
        logits = torch.zeros(*ids.shape, self.config.vocab_size)
        for row, line in enumerate(self.script):
            logits[row, -1, line[len(self.fed) - 1]] = 9.0
        return Output(logits, [])



def test_left_pad():
    """Every row ends at T; valid marks what is not padding."""
    ids, valid = left_pad([[1], [2, 3, 4], [5, 6]], 9, "cpu")
    assert ids.tolist() == [[9, 9, 1], [2, 3, 4], [9, 5, 6]] and ids.dtype == torch.long
    assert valid.long().tolist() == [[0, 0, 1], [1, 1, 1], [0, 1, 1]] and valid.dtype == torch.bool
    assert left_pad([[1, 2]], 9, "cpu")[1].all()


def test_sample():
    """Temperature 0 is argmax; else frequencies follow softmax(logits / temperature), and the
    generator decides.
    """
    logits = torch.tensor([[0.0, 1.0, 2.0, -torch.inf], [3.0, 0.0, -1.0, 1.0]])
    assert sample(logits, 0, None).tolist() == [2, 0]
    many = logits.repeat(20_000, 1)
    draws = [sample(many, 2.0, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2]) and draws[0].shape == (40_000,)
    for row in range(2):
        share = torch.bincount(draws[0][row::2], minlength=4) / 20_000
        assert (share - (logits[row] / 2).softmax(0)).abs().max() < 0.015
    assert (sample(many, 1e-3, None)[::2] == 2).all()


@given(st.integers(0, 10**6), st.integers(1, 7), st.floats(0.01, 1.0), st.floats(0.1, 3.0))
def test_top_k_and_top_p(seed, k, p, temperature):
    """Only ids among the k likeliest, and among the likeliest that reach p together, are ever
    drawn; all of those are; k = 1 and a tiny p are argmax; both off is the plain draw.
    """
    logits = torch.randn(1, 6, generator=torch.Generator().manual_seed(seed))
    order = logits[0].argsort(descending=True).tolist()
    shares = (logits[0] / temperature).softmax(0)[order].tolist()
    nucleus = next((n for n in range(1, 7) if sum(shares[:n]) >= p - 1e-6), 6)
    allowed = order[:min(k, nucleus)]
    drawn = set(sample(logits.repeat(3000, 1), temperature, torch.Generator().manual_seed(1), k, p).tolist())
    # a sum that meets p to the last bit may count either way
    assert drawn <= set(order[:min(k, nucleus + 1)])
    assert {i for i, share in zip(order, shares) if i in allowed and share > 0.02} <= drawn
    assert sample(logits, temperature, None, 1).item() == sample(logits, temperature, None, None, 1e-9).item() == order[0]


def kept_by(monkeypatch, logits, **options):
    """How many ids of one row `sample` leaves to chance."""
    seen, real = [], torch.multinomial
    monkeypatch.setattr(torch, "multinomial", lambda p, *given, **more: seen.append(int((p > 0).sum())) or real(p, *given, **more))
    sample(logits, 1.0, torch.Generator().manual_seed(0), **options)
    monkeypatch.undo()
    return seen[0]


def test_top_p_ends_where_it_is_reached(monkeypatch):
    """top_p = 1 drops no id, also where the float32 sum reaches 1 early; ids that reach top_p
    exactly end there.
    """
    many = 3 * torch.randn(1, 184_622, generator=torch.Generator().manual_seed(0))
    assert kept_by(monkeypatch, many) == kept_by(monkeypatch, many, top_p=1.0) == int((many.softmax(-1) > 0).sum())
    few = torch.tensor([[.3, .1, .1, .5]]).log()
    assert [kept_by(monkeypatch, few, top_p=p) for p in (.49, .5, .51, .79, .8, .81, .9, .95)] == [1, 1, 2, 2, 2, 3, 3, 4]
    assert [kept_by(monkeypatch, few, top_p=.8, top_k=k) for k in (1, 2, 4)] == [1, 2, 2]


@both
def test_weights_that_are_not_numbers_are_named(backbone):
    """Before anything is drawn or answered, at any temperature: the first weight of them,
    wherever it is.
    """
    tokens, model = make(backbone)
    for name in (f"routers.1.{PLAN.routed(1)[0]}.score.weight", "blocks.0.mlp.down.weight", "embed.weight"):
        with torch.no_grad():
            dict(model.named_parameters())[name].view(-1)[0] = torch.nan if "mlp" in name else torch.inf
        for draw in (lambda: generate_text(model, tokens, pictures(tokens, 1)[0], "a"), lambda: generate_image(model, tokens, "a"),
                     lambda: generate_image(model, tokens, "a", temperature=0)):
            with pytest.raises(ValueError, match=f"of the model's weights are not finite, {name} is the first: take a checkpoint"):
                draw()


@both
def test_stop_ids(backbone):
    """Any id of `stop` ends an answer like eot does, row by row."""
    tokens, model = make(backbone)
    script = Script(model.config, [[0, 1, 2, 3, 4], [3, 0, 0, 0, 0], [0, 0, 0, tokens.eot, 1]])
    assert generate_text(script, tokens, pictures(tokens, 3), ["a", "b", "c"], stop=(2, 3)) == ["a b", "", "a a a"]


@both
def test_a_picture_may_be_given_as_its_codes(backbone, monkeypatch):
    """Codes get the answers of the picture that they draw, without being coded a second time."""
    tokens, model = make(backbone)
    images, questions = pictures(tokens, 3), ["a", "b c", "d"]
    codes = tokens.image.encode(images)
    answers = generate_text(model, tokens, images, questions)
    monkeypatch.setattr(type(tokens.image), "encode", None)
    assert generate_text(model, tokens, codes, questions) == answers
    assert generate_text(model, tokens, codes[1], questions[1]) == answers[1]


@pytest.mark.parametrize("options", [dict(temperature=-0.1), dict(top_k=0), dict(top_p=0.0), dict(top_p=1.5)])
def test_sampling_that_cannot_be(options):
    """A negative temperature, no candidates or a share outside (0, 1] is a ValueError with the
    values; so are 0 steps.
    """
    tokens, model = make("showo")
    with pytest.raises(ValueError, match="temperature must be finite and >= 0, top_k >= 1 and top_p in"):
        generate_text(model, tokens, pictures(tokens, 1)[0], "a", **options)
    with pytest.raises(ValueError, match="steps and prompts must be at least 1, got 0 and 1"):
        generate_image(model, tokens, "a", steps=0)


@both
def test_a_tokenizer_of_another_model(backbone):
    """Another backbone's, or one with another vocabulary, is refused with what differs; so is a
    picture that is no tensor.
    """
    tokens, model = make(backbone)
    other, _ = make("emu3" if backbone == "showo" else "showo")
    longer = Tokenizer(backbone, WordText([*WORDS, "f"]), tokens.image, tokens.grid, 8, system="sys", assistant="asst")
    for foreign in (other, longer):
        with pytest.raises(ValueError, match="the tokenizer is of another model: .* Use the one"):
            generate_image(model, foreign, "a")
        with pytest.raises(ValueError, match=f"image codes from {foreign.image_start}.* the model: {backbone}"):
            generate_text(model, foreign, pictures(tokens, 1)[0], "a")
    with pytest.raises(ValueError, match="image must be a tensor of pixels or codes, got ndarray"):
        generate_text(model, tokens, pictures(tokens, 1)[0].numpy(), "a")


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("guidance", (-0.5, math.inf, math.nan))
def test_guidance_that_cannot_be(backbone, guidance):
    """A negative or an infinite guidance is a ValueError with the value, before anything is
    drawn.
    """
    tokens, model = make(backbone)
    with pytest.raises(ValueError, match=f"guidance must be finite and >= 0, got {guidance}"):
        generate_image(model, tokens, "a", guidance=guidance)


def test_guided():
    """Log-probabilities c + w (c - u), the conditional rows first; w = 0 is one stream,
    unchanged.
    """
    logits = torch.randn(6, 2, 5, dtype=torch.float64)
    assert torch.equal(guided(logits, 0), logits)
    c, u = logits[:3].log_softmax(-1), logits[3:].log_softmax(-1)
    assert torch.allclose(guided(logits, 2.5).double(), 3.5 * c - 2.5 * u, atol=1e-5)
    assert torch.allclose(guided(logits[:3].repeat(2, 1, 1), 7.0).double(), c, atol=1e-5)



@both
def test_random_routers_both_keep_and_drop(backbone):
    """What the tests of this file rest on: predictors, scores and top-k of the tiny models
    disagree about tokens.
    """
    tokens, model = make(backbone)
    batch = tokens.mmu(["a b c"] * 4, ["d"] * 4, tokens.image.encode(pictures(tokens, 4)))
    topk, causal = (model(**batch.inputs(), task="mmu", routing=rule).routing for rule in RULES)
    shares = [r.selected.float().mean() for r in causal if r is not None]
    assert len(shares) == 3 and any(0.1 < share < 0.9 for share in shares)
    assert any(not torch.equal(a.selected, b.selected) for a, b in zip(topk, causal) if a is not None)


def test_decoder_routes_as_it_is_told():
    """routing="topk" recomputes and keeps no cache; its logits are those of a plain forward."""
    tokens, model = make("emu3")
    ids = torch.tensor([[tokens.special["BOS"], 0, 1, 2, 3]])
    decode = Decoder(model, "mmu", "topk", 1, 8)
    assert decode.cache is None and Decoder(model, "mmu", "causal", 1, 8).cache is not None
    decode(ids[:, :3]), decode(ids[:, 3:4])
    assert torch.allclose(decode(ids[:, 4:]), model(ids, task="mmu", routing="topk").logits[:, -1], atol=1e-10)



@both
@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=12)
@given(questions, st.sampled_from(GRIDS), st.integers(0, 10**6))
def test_answers_equal_recomputation(backbone, rule, asked, grid, seed):
    """Greedy answers of a left-padded batch (cached where causal) are those of recomputing each
    row alone.
    """
    tokens, model = make(backbone, grid, seed)
    images = pictures(tokens, len(asked), seed)
    got = generate_text(model, tokens, images, asked, routing=rule, max_tokens=5)
    assert got == [slow_answer(model, tokens, image, q, rule, 5) for image, q in zip(images, asked)]


@both
@pytest.mark.parametrize("rule", RULES)
def test_answers_with_learned_image_positions(backbone, rule):
    """The n-th image token gets learned position n whether or not earlier ones are in the cache."""
    for seed in range(4):
        tokens, model = make(backbone, seed=seed, positions=6)
        images = pictures(tokens, 2, seed)
        got = generate_text(model, tokens, images, ["a b", "c"], routing=rule, max_tokens=6)
        assert got == [slow_answer(model, tokens, image, q, rule, 6) for image, q in zip(images, ["a b", "c"])]
        if backbone == "emu3":
            slow = torch.stack([slow_rows(model, tokens, p, rule) for p in ("a b", "c")])
            drawn = generate_image(model, tokens, ["a b", "c"], routing=rule, temperature=0.0)
            assert torch.equal(tokens.image.encode(drawn), slow)


@both
@pytest.mark.parametrize("rule", RULES)
def test_one_question_or_a_list(backbone, rule):
    """A str with one picture gives a str, a list gives a list, and they agree; seeds reproduce
    sampled answers.
    """
    tokens, model = make(backbone)
    image = pictures(tokens, 1)
    one = generate_text(model, tokens, image[0], "a b", routing=rule)
    assert isinstance(one, str) and generate_text(model, tokens, image, ["a b"], routing=rule) == [one]
    three = image.repeat(3, 1, 1, 1), ["a b"] * 3
    drawn = [generate_text(model, tokens, *three, routing=rule, temperature=2.0, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert generate_text(model, tokens, *three, routing=rule) == [one] * 3


@both
def test_answers_end_at_eot(backbone):
    """What a row says after its eot is not in the answer and is not fed back; decoding stops
    when all have ended.
    """
    tokens, model = make(backbone)
    eot, pad = tokens.eot, tokens.pad
    script = Script(model.config, [[0, 1, eot, 2, 2, 2, 2], [eot, 3, 3, 3, 3, 3, 3], [2, pad, 3, 4, eot, 0, 0]])
    got = generate_text(script, tokens, pictures(tokens, 3), ["a", "b c", ""])
    assert got == ["a b", "", "c d e"]
    assert [fed.tolist() for fed in script.fed[1:]] == [
        [[0], [eot], [2]], [[1], [eot], [pad]], [[eot], [eot], [3]], [[eot], [eot], [4]]]
    script = Script(model.config, [[0, 1, 2, 3, 4, 0, 1, 2, 3]])
    assert generate_text(script, tokens, pictures(tokens, 1)[0], "a", max_tokens=3) == "a b c"


@both
def test_every_question_that_fits_can_be_answered(backbone):
    """A model as long as the training sequences never runs out of positions, however long it
    talks.
    """
    tokens, model = make(backbone)
    tokens, model = make(backbone, max_length=tokens.length("mmu"))
    with torch.no_grad():
        model.head.weight[tokens.eot] = 0.0  # never the largest: it talks until it is stopped
        if backbone == "showo":
            model.head.bias[tokens.eot] = -1e9
    for rule in RULES:
        long, short = generate_text(model, tokens, pictures(tokens, 2), ["a b c d", "a"], routing=rule)
        assert isinstance(long, str) and isinstance(short, str)


@both
def test_a_question_that_does_not_fit(backbone):
    """A prompt longer than the model's max_length is a ValueError naming it, not a crash; one that
    just fits has room for one token.
    """
    tokens, model = make(backbone)
    prompt = tokens.mmu_prompt("a b", tokens.image_ids(torch.zeros(1, *tokens.grid).long())[0].tolist())
    for short in (0, 1):
        _, model = make(backbone, max_length=len(prompt) - short)
        for rule in RULES:
            if short:
                with pytest.raises(ValueError, match=f"max_length.*{len(prompt) - 1}"):
                    generate_text(model, tokens, pictures(tokens, 1)[0], "a b", routing=rule)
            else:
                answer = generate_text(model, tokens, pictures(tokens, 1)[0], "a b", routing=rule)
                assert len(answer.split()) <= 1


@both
def test_only_routings_with_a_label(backbone):
    """causal, and topk, which is labelled non-causal: the predictors' ranking over a whole
    sequence is for training.
    """
    tokens, model = make(backbone)
    for call in (lambda: generate_text(model, tokens, pictures(tokens, 1)[0], "a", routing="predicted"),
                 lambda: generate_image(model, tokens, "a", routing="predicted")):
        with pytest.raises(ValueError, match='routing must be "causal" or "topk" .non-causal., got \'predicted\''):
            call()


@both
def test_the_likeliest_code_alone(backbone):
    """top_k=1 draws Emu3's picture as temperature 0 does, and any picture whatever the
    temperature; 0 is refused.
    """
    tokens, model = make(backbone)
    hot, hotter = (generate_image(model, tokens, "a b", temperature=t, top_k=1, seed=3) for t in (0.5, 9.0))
    assert torch.equal(hot, hotter)
    if backbone == "emu3":
        assert torch.equal(hot, generate_image(model, tokens, "a b", temperature=0.0))
    with pytest.raises(ValueError, match="top_k >= 1"):
        generate_image(model, tokens, "a b", top_k=0)


def test_a_temperature_next_to_nothing():
    """Logits over 1e-39 are infinite, 1e-60 is 0 in float32: what is drawn is the likeliest id
    all the same.
    """
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    assert [sample(logits, t, torch.Generator().manual_seed(0)).tolist() for t in (1e-39, 1e-60)] == [[1], [1]]


@both
def test_counts_must_match(backbone):
    """Two pictures for one question, or the reverse, is a ValueError naming both numbers; so is
    a bad picture.
    """
    tokens, model = make(backbone)
    for count, asked in ((2, ["a"]), (1, ["a", "b"])):
        with pytest.raises(ValueError, match=f"{count} images for {len(asked)} questions"):
            generate_text(model, tokens, pictures(tokens, count), asked)
    with pytest.raises(ValueError, match="images|grid"):
        generate_text(model, tokens, pictures(tokens, 1), "a")  # a batch with a single question
    with pytest.raises(ValueError, match="grid"):
        generate_text(model, tokens, pictures(tokens, 1)[0, :2], "a")    # another size
    with pytest.raises(ValueError, match="'zebra'"):
        generate_text(model, tokens, pictures(tokens, 1)[0], "zebra")



@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("grid", GRIDS)
def test_rows_equal_recomputation(rule, grid):
    """Emu3, greedy: a batch of prompts of different lengths gives the codes that slow loops give
    each prompt alone.
    """
    for seed in range(3):
        tokens, model = make("emu3", grid, seed)
        prompts = ["a b c", "", "e"]
        got = tokens.image.encode(generate_image(model, tokens, prompts, rule, temperature=0.0))
        assert torch.equal(got, torch.stack([slow_rows(model, tokens, prompt, rule) for prompt in prompts]))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("size", [0.0, 1.0])
@pytest.mark.parametrize("grid", GRIDS)
def test_parallel_drawing_equals_recomputation(rule, grid, size, monkeypatch):
    """Show-o, greedy codes: step by step the same ones are fixed and hidden as by slow loops over
    each prompt alone.

    With choice noise too: Gumbel, -log(-log u), times `size`, fading linearly to 0 at the last
    step.
    """
    monkeypatch.setattr(generate, "CHOICE_NOISE", size)
    prompts = ["a b c", "", "e"]
    for seed in range(2):
        for steps in (1, 2, 4, 9):
            tokens, model = make("showo", grid, seed)
            generator = torch.Generator().manual_seed(seed)
            uniform = torch.stack([torch.rand(3, tokens.n_image, generator=generator) for _ in range(steps)], 1)
            slow = torch.tensor([slow_parallel(model, tokens, prompt, rule, size * -u.log().neg().log())
                                 for prompt, u in zip(prompts, uniform)])
            seen = film(model, tokens)
            last = tokens.image_ids(tokens.image.encode(
                generate_image(model, tokens, prompts, rule, temperature=0.0, steps=steps, seed=seed)))
            for fed, wanted in zip([*seen, last], [*slow.unbind(1)[:len(seen)], slow[:, -1]], strict=True):
                assert torch.equal(fed, wanted), (seed, steps)


@both
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("grid", GRIDS)
def test_pictures_are_on_the_palette(backbone, rule, grid):
    """uint8 pictures of the grid's size made of known patches, for a str and a list, with and
    without guidance.
    """
    tokens, model = make(backbone, grid)
    size = (2 * grid[0], 2 * grid[1], 3)
    for guidance in (0.0, 1.5):
        images = generate_image(model, tokens, ["a", "b c"], rule, guidance=guidance, steps=3)
        assert images.shape == (2, *size) and images.dtype == torch.uint8
        assert torch.equal(tokens.image.decode(tokens.image.encode(images)), images)
        assert generate_image(model, tokens, "a", rule, guidance=guidance, steps=3).shape == size


@both
def test_one_prompt_or_a_list(backbone, monkeypatch):
    """A str gives the picture that a list of one gives; rows of a greedy batch do not see each
    other (but share one stream of random numbers, from which Show-o's noise comes).
    """
    tokens, model = make(backbone, (3, 3))
    prompts = ["a b c d e", "e", "b b"]
    for temperature in (0.0, 1.0):
        alone = [generate_image(model, tokens, p, temperature=temperature) for p in prompts]
        assert all(torch.equal(generate_image(model, tokens, [p], temperature=temperature)[0], image)
                   for p, image in zip(prompts, alone))
    monkeypatch.setattr(generate, "CHOICE_NOISE", 0.0)
    assert torch.equal(generate_image(model, tokens, prompts, temperature=0.0), torch.stack(
        [generate_image(model, tokens, p, temperature=0.0) for p in prompts]))


@both
@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_seeds_reproduce_pictures(backbone, guidance):
    """The same seed draws the same pictures and leaves the global generator alone; another seed
    draws others.
    """
    tokens, model = make(backbone, (3, 3))
    state = torch.get_rng_state()
    first, again, other = (generate_image(model, tokens, ["a", "b"], guidance=guidance, steps=4, seed=seed)
                           for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


@both
def test_guidance(backbone):
    """Guidance 0 runs one stream, w > 0 a second one with an empty caption; w -> 0 tends to the
    picture without.
    """
    tokens, model = make(backbone, (3, 3))
    seen, original = [], model.forward
    model.forward = lambda ids, **rest: (seen.append(ids.clone()), original(ids, **rest))[1]
    plain = generate_image(model, tokens, ["a b", "c"], temperature=0.0, steps=4)
    assert {len(ids) for ids in seen} == {2}
    seen.clear()
    almost = generate_image(model, tokens, ["a b", "c"], temperature=0.0, steps=4, guidance=1e-12)
    assert torch.equal(almost, plain) and {len(ids) for ids in seen} == {4}
    empty = [i for i in seen[0][3].tolist() if i != tokens.pad]
    prompt = tokens.t2i_prompt("")  # without its soi where the prompt is prefilled by itself
    assert empty[:len(prompt)] == prompt[:len(empty)] and len(empty) > 2 and torch.equal(seen[0][2], seen[0][3])
    far = generate_image(model, tokens, ["a b", "c"], temperature=0.0, steps=4, guidance=50.0)
    assert not torch.equal(far, plain)


@pytest.mark.parametrize("rule", RULES)
def test_guided_rows_equal_recomputation(rule):
    """Emu3 with guidance, greedy: each code is the argmax of c + w (c - u), both streams fed
    with the same codes.
    """
    tokens, model = make("emu3")
    codes, w = [], 1.5
    for n in range(6):
        tail = [i for k, c in enumerate(codes) for i in [c] + [tokens.special["EOL"]] * (k % 3 == 2)]
        rows = [torch.tensor([tokens.t2i_prompt(p) + tail]) for p in ("a b", "")]
        coming = 2 * 4 + 3 - len(tail)  # of two rows of three codes and EOL, EOF, eoi, EOS
        c, u = (model(row, task="t2i", routing=rule, n_future=coming).logits[0, -1].log_softmax(-1) for row in rows)
        codes.append(int((c + w * (c - u))[tokens.image_start:tokens.image_end].argmax()) + tokens.image_start)
    image = generate_image(model, tokens, "a b", rule, temperature=0.0, guidance=w)
    assert (tokens.image.encode(image[None]) + tokens.image_start).flatten().tolist() == codes


@pytest.mark.parametrize("steps", [1, 2, 5, 9, 30])
def test_parallel_drawing_hides_less_and_less(steps):
    """Before the first step all codes are masked, later floor(N cos(pi s / 2 S)), at most N - s;
    drawn codes stay.
    """
    tokens, model = make("showo", (3, 3))
    seen = film(model, tokens)
    image = generate_image(model, tokens, ["a", "b c"], steps=steps)
    hidden = [(ids == tokens.mask_id) for ids in seen]
    wanted = [9] + [max(0, min(math.floor(9 * math.cos(math.pi / 2 * s / steps)), 9 - s)) for s in range(1, steps)]
    assert [h.sum(1).tolist() for h in hidden][:9] == [[n, n] for n in wanted][:9]
    for before, after in zip(seen, [*seen[1:], tokens.image_ids(tokens.image.encode(image))]):
        fixed = before != tokens.mask_id
        assert torch.equal(before[fixed], after[fixed])


def test_the_choice_is_noisy_by_default():
    """Which codes are fixed first differs between seeds even with greedy codes."""
    orders = set()
    for seed in range(6):
        tokens, model = make("showo", (3, 3))
        seen = film(model, tokens)
        generate_image(model, tokens, "a", temperature=0.0, steps=4, seed=seed)
        orders.add(tuple(map(tuple, (torch.cat(seen) == tokens.mask_id).tolist())))
    assert len(orders) > 3


@both
def test_picture_errors(backbone):
    """An unknown word and a caption over budget are ValueErrors."""
    tokens, model = make(backbone)
    for prompt, word in (("zebra", "'zebra'"), ("a " * 9, "budget")):
        with pytest.raises(ValueError, match=word):
            generate_image(model, tokens, prompt)


def test_a_parallel_prompt_is_prefilled_once():
    """Show-o, causal: one forward over the prompt, then one over soi..eoi alone for every step."""
    tokens, model = make("showo", (3, 3))
    seen, original = [], model.forward
    model.forward = lambda ids, **rest: (seen.append(tuple(ids.shape)), original(ids, **rest))[1]
    generate_image(model, tokens, ["a b", "c"], steps=4)
    assert seen == [(2, tokens.length("t2i") - 11)] + [(2, 11)] * 4


@both
def test_nothing_to_do(backbone):
    """An empty list of prompts or questions is a ValueError with the number."""
    tokens, model = make(backbone)
    with pytest.raises(ValueError, match="at least 1, got 12 and 0"):
        generate_image(model, tokens, [])
    with pytest.raises(ValueError, match="0 images for 0 questions"):
        generate_text(model, tokens, pictures(tokens, 1)[:0], [])


def test_a_picture_that_does_not_fit():
    """Emu3: prompt and picture longer than max_length is a ValueError before the first step; one
    that just fits draws.
    """
    tokens, _ = make("emu3")
    length = len(tokens.t2i_prompt("a b")) + 2 * 4 - 2
    for short in (0, 1):
        _, model = make("emu3", max_length=length - short)
        for rule in RULES:
            if short:
                with pytest.raises(ValueError, match=f"{length} tokens with the longest prompt, but max_length is {length - 1}"):
                    generate_image(model, tokens, "a b", rule)
            else:
                assert generate_image(model, tokens, "a b", rule).shape == (4, 6, 3)


@both
def test_unknown_routing(backbone):
    """A misspelt routing rule is a ValueError naming it, not silently one of the two."""
    tokens, model = make(backbone)
    with pytest.raises(ValueError, match="routing.*'casual'"):
        generate_text(model, tokens, pictures(tokens, 1)[0], "a", routing="casual")
    with pytest.raises(ValueError, match="routing.*'casual'"):
        generate_image(model, tokens, "a", routing="casual")

"""objectives.py: cross-entropy, masked image tokens, dropped prompts, the losses of a task."""
import math
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import build, seeds, tiny
from unimod_mini import objectives
from unimod_mini.objectives import (Losses, cross_entropy, drop_prompts, mask_image_tokens,
                                    task_losses, training_rule)
from unimod_mini.plan import Plan
from unimod_mini.routers import predictor_loss
from unimod_mini.tokenizer import IGNORE, Palette, Tokenizer, WordText

GRID = (3, 4)
N = GRID[0] * GRID[1]
PATCHES = torch.arange(5 * 12).view(5, 2, 2, 3)


def tokenizer(backbone="showo"):
    """Three words, five image codes, pictures of 3 x 4 codes."""
    return Tokenizer(backbone, WordText(["a", "b", "c"] + ["3*4"]), Palette(PATCHES), GRID, text_length=5, system="",
                     assistant="")


def t2i_batch(rows, seed=0):
    """Captions of different lengths with random pictures."""
    codes = torch.randint(5, (rows, *GRID), generator=torch.Generator().manual_seed(seed))
    return tokenizer().t2i([("a b c" + " a" * row)[:2 * (row % 4)] for row in range(rows)], codes)


# ---------------------------------------------------------------- cross-entropy

@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 9), seeds,
       st.sampled_from((torch.float32, torch.bfloat16)))
def test_cross_entropy_against_a_loop(B, T, V, seed, dtype):
    """Mean over the labelled tokens of -log softmax(logits)[label], in float32; 0 when nothing
    is labelled.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(B, T, V, generator=generator)).to(dtype)
    labels = torch.randint(V, (B, T), generator=generator)
    labels[torch.rand(B, T, generator=generator) < .5] = IGNORE
    terms = []
    for row, targets in zip(logits.tolist(), labels.tolist()):
        terms += [math.log(sum(math.exp(z) for z in token)) - token[y] for token, y in zip(row, targets) if y != IGNORE]
    loss = cross_entropy(logits, labels)
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert loss.item() == pytest.approx(sum(terms) / max(len(terms), 1), rel=1e-4, abs=1e-5)


def test_cross_entropy_without_labels():
    """A batch without labels has loss 0 and gradient 0, not NaN."""
    logits = torch.randn(2, 3, 4, requires_grad=True)
    loss = cross_entropy(logits, torch.full((2, 3), IGNORE))
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()


def test_unlabelled_tokens_get_no_gradient():
    """Only the logits of labelled tokens move."""
    logits, labels = torch.randn(1, 3, 4, requires_grad=True), torch.tensor([[IGNORE, 2, IGNORE]])
    cross_entropy(logits, labels).backward()
    assert logits.grad.abs().sum(-1).bool().tolist() == [[False, True, False]]


# ---------------------------------------------------------------- masked image tokens

@given(st.integers(1, 5), seeds)
def test_mask_hides_codes_only(rows, seed):
    """Masked positions hold the mask id, they are codes, they keep their code as the unshifted
    label; nothing else is labelled or changed; at least one a row is masked; the input batch is
    left alone.
    """
    batch, tok = t2i_batch(rows, seed), tokenizer()
    before = batch.ids.clone()
    masked = mask_image_tokens(batch, tok, torch.Generator().manual_seed(seed))
    hidden = masked.labels != IGNORE
    assert torch.equal(hidden, masked.ids == tok.mask_id) and torch.equal(batch.ids, before)
    assert ((before >= tok.image_start) & (before < tok.image_end))[hidden].all()
    assert torch.equal(masked.labels[hidden], before[hidden]) and torch.equal(masked.ids[~hidden], before[~hidden])
    assert ((hidden.sum(1) >= 1) & (hidden.sum(1) <= N)).all()
    assert masked.spans is batch.spans and masked.valid is batch.valid


@given(st.integers(1, 5), seeds)
def test_mask_of_a_row_does_not_depend_on_its_batch(rows, seed):
    """With a generator a row, every row is masked as it is alone."""
    batch, tok = t2i_batch(rows, seed), tokenizer()
    own = lambda i: torch.Generator().manual_seed(seed + i)
    together = mask_image_tokens(batch, tok, [own(i) for i in range(rows)])
    for i in range(rows):
        alone = mask_image_tokens(batch._replace(ids=batch.ids[i:i + 1], labels=batch.labels[i:i + 1]), tok, own(i))
        assert torch.equal(alone.ids[0], together.ids[i]) and torch.equal(alone.labels[0], together.labels[i])


def test_mask_count():
    """A row hides round(N cos(pi u / 2)) codes, at least one, for its own u, the first draw of
    the generator.
    """
    batch = t2i_batch(500)
    masked = mask_image_tokens(batch, tokenizer(), torch.Generator().manual_seed(3))
    u = torch.rand(500, 1, generator=torch.Generator().manual_seed(3)).squeeze(1).tolist()
    expected = [max(1, round(N * math.cos(math.pi * x / 2))) for x in u]
    assert (masked.labels != IGNORE).sum(1).tolist() == expected and {1, N} <= set(expected)


def test_mask_distribution():
    """Over u ~ U(0, 1): P(count >= n) = 2 / pi arccos((n - 1/2) / N), and every place is hidden
    equally often.
    """
    rows = 20_000
    one = t2i_batch(1)
    batch = one._replace(ids=one.ids.repeat(rows, 1), labels=one.labels.repeat(rows, 1))
    masked = mask_image_tokens(batch, tokenizer(), torch.Generator().manual_seed(0))
    hidden = masked.labels != IGNORE
    for n in range(2, N + 1):
        share = (hidden.sum(1) >= n).double().mean().item()
        assert share == pytest.approx(2 / math.pi * math.acos((n - .5) / N), abs=.015), n
    often = hidden.double().mean(0)[one.labels[0] != IGNORE]
    assert len(often) == N and float(often.max() - often.min()) < .02


# ---------------------------------------------------------------- prompts, task losses

def test_drop_prompts_rate():
    """Each caption is emptied with probability `rate`, on its own, in place; rate 0 and 1 are
    exact.
    """
    captions = [f"c{i}" for i in range(20_000)]
    dropped = drop_prompts(captions, .1, Random(0))
    assert all(new in ("", old) for new, old in zip(dropped, captions))
    empty = [new == "" for new in dropped]
    assert sum(empty) == pytest.approx(2000, abs=170)                     # 4 standard deviations
    assert sum(a and b for a, b in zip(empty, empty[1:])) == pytest.approx(200, abs=60)
    assert drop_prompts(captions, 0, Random(0)) == captions and set(drop_prompts(captions, 1, Random(0))) == {""}
    assert dropped == drop_prompts(captions, .1, Random(0)) and captions[0] == "c0"


@pytest.mark.parametrize("backbone", ("showo", "emu3"))
def test_task_losses(backbone):
    """The task loss is the cross-entropy at the labels, with no further shift; the predictor's is
    the mean over the routed layers, and 0 without any.
    """
    tok = tokenizer(backbone)
    batch = tok.mmu(["a", "b c"], ["b", "c"], torch.zeros(2, *GRID, dtype=torch.long))
    config = tiny(backbone, vocab_size=tok.vocab_size, image_start=tok.image_start)
    model = build(config, Plan({"mmu": (.5, 1, .3)}), dtype=torch.float32)
    losses, out = task_losses(model, batch, "mmu"), model(**batch.inputs(), task="mmu")
    where = (batch.labels != IGNORE).nonzero().tolist()
    terms = [-out.logits[b, i].log_softmax(0)[batch.labels[b, i]].item() for b, i in where]
    assert len(terms) == 4 and losses.task.item() == pytest.approx(sum(terms) / 4, rel=1e-5)
    parts = [predictor_loss([out.routing[layer]], batch.valid).item() for layer in (0, 2)]
    assert losses.predictor.item() == pytest.approx(sum(parts) / 2, rel=1e-5)
    assert task_losses(build(config), batch, "mmu").predictor.item() == 0


@pytest.mark.parametrize("backbone, rules", [("showo", ["topk", "topk"]), ("emu3", ["topk", "predicted"])])
def test_pictures_drawn_token_by_token_meet_the_predictors_choice(backbone, rules):
    """In every other step, t2i without spans alone; the losses are those of the model's rule."""
    tok, codes = tokenizer(backbone), torch.zeros(2, *GRID, dtype=torch.long)
    batches = {"t2i": tok.t2i(["a", "b c"], codes), "mmu": tok.mmu(["a", "b c"], ["b", "c"], codes)}
    assert [training_rule(step, batches["t2i"], "t2i") for step in range(4)] == 2 * rules
    assert {training_rule(step, batches["mmu"], "mmu") for step in range(4)} == {"topk"}
    config = tiny(backbone, vocab_size=tok.vocab_size, image_start=tok.image_start)
    model = build(config, Plan({"t2i": (.5, 1, .3)}), dtype=torch.float32)
    losses = [task_losses(model, batches["t2i"], "t2i", rule).task for rule in ("topk", "predicted")]
    wanted = [cross_entropy(model(**batches["t2i"].inputs(), task="t2i", routing=rule).logits, batches["t2i"].labels)
              for rule in ("topk", "predicted")]
    assert losses == wanted and losses[0] != losses[1]


def test_the_auxiliary_loss_has_its_weight():
    """Under membership="router" the loss on the router's own score is that of the scores,
    weighted 0.1.
    """
    tok = tokenizer("emu3")
    batch = tok.mmu(["a"], ["b"], torch.zeros(1, *GRID, dtype=torch.long))
    config = tiny("emu3", vocab_size=tok.vocab_size, image_start=tok.image_start, membership="router")
    model = build(config, Plan({"mmu": (1, .5, 1)}), dtype=torch.float32)
    routing = model(**batch.inputs(), task="mmu").routing[1]
    assert torch.equal(routing.predictor, routing.scores)
    assert task_losses(model, batch, "mmu").predictor.item() == pytest.approx(
        0.1 * predictor_loss([routing], batch.valid).item(), rel=1e-5)


@pytest.mark.parametrize("weights, total", [((), 3 + 5 + 7), (({"t2i": 1, "mmu": 4, "lm": 0},), 3 + 20)])
def test_a_step_weighs_the_tasks(monkeypatch, weights, total):
    """t2i and mmu count 1 and lm 0.1 (Show-o), or what is given; the predictors' loss is not
    weighted by task.
    """
    model, ones = torch.nn.Linear(1, 1), dict.fromkeys(("t2i", "mmu", "lm"))
    sizes = {"t2i": 3.0, "mmu": 5.0, "lm": 70.0}
    monkeypatch.setattr(objectives, "task_losses", lambda model, _, task, rule: Losses(sizes[task] * model.bias[0], model.weight[0, 0]))
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: None)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = [p.item() for p in model.parameters()]
    objectives.train_step(model, [optimizer], ones, 0, 0.5, *weights)
    moved = [a - p.item() for a, p in zip(before, model.parameters())]
    assert moved == pytest.approx([0.5 * 3, 0.5 * total], rel=1e-5)

"""benchmarks/observations.py: attention received, layers left out, tasks that compete for one
router.
"""
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import BACKBONES, N_LAYER, build, call, naive_sees, plans, real, seeds, tiny
from benchmarks import observations
from unimod_mini.objectives import cross_entropy
from unimod_mini.plan import Plan, capacity
from unimod_mini.routers import TaskRouter
from unimod_mini.tokenizer import IGNORE, Batch

backbones, paddings = st.sampled_from(BACKBONES), st.sampled_from(("none", "left", "right", "both", "holes"))
few = settings(max_examples=15)


def sample(config, rows, length, seed, padding="none", spans=False):
    """A Batch of random ids; every valid token has a random label."""
    inputs = call(config, rows, length, seed, padding, spans)
    labels = torch.randint(config.vocab_size, inputs["ids"].shape, generator=torch.Generator().manual_seed(seed))
    return Batch(inputs["ids"], inputs.get("spans"), inputs.get("valid"), labels.masked_fill(~real(inputs), IGNORE))



@few
@given(backbones, paddings, st.booleans(), seeds)
def test_attention_received_pair_by_pair(backbone, padding, spans, seed):
    """The mean, one pair after the other, of (tokens that i sees) x (attention of i to j), from
    the q and k that run.
    """
    config = tiny(backbone)
    batch, caught, attend = sample(config, 2, 9, seed, padding, spans), [], F.scaled_dot_product_attention
    model = build(config, seed=seed)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(F, "scaled_dot_product_attention",
                      lambda q, k, v, **rest: (caught.append((q, k)), attend(q, k, v, **rest))[1])
        model(**batch.inputs(), task="t2i")
    got = observations.attention_received(model, batch, "t2i")
    positions = model.context(batch.ids, None, batch.spans, batch.valid).positions
    span = torch.zeros_like(batch.ids) if batch.spans is None else batch.spans
    for layer, (q, k) in enumerate(caught):
        values = {kind: [] for kind in observations.KINDS}
        for b, row in enumerate(batch.ids):
            keys = batch.is_valid[b]
            for i in keys.nonzero().flatten().tolist():
                seen = [j for j in range(9) if naive_sees(i, j, positions[b], span[b], keys)]
                heads = [torch.stack([q[b, h, i] @ k[b, h * k.shape[1] // q.shape[1], j] for j in seen])
                         for h in range(q.shape[1])]
                weights = sum((scores / config.head_width ** 0.5).softmax(0) for scores in heads) / len(heads)
                for j, weight in zip(seen, weights.tolist()):
                    values["image" if row[j] >= config.image_start else "text"].append(len(seen) * weight)
        for kind, numbers in values.items():
            mean = sum(numbers) / len(numbers) if numbers else float("nan")
            assert got[kind][layer].item() == pytest.approx(mean, rel=1e-4, nan_ok=True)
        assert got["text"].shape == (N_LAYER,)


@few
@given(backbones, paddings, st.booleans(), seeds)
def test_even_attention_is_received_as_one(backbone, padding, spans, seed):
    """Without queries every token that is seen gets the same: 1 for both kinds, in every layer."""
    config = tiny(backbone, qk_norm=False)
    model = build(config, seed=seed)
    with torch.no_grad():
        for block in model.blocks:
            for p in block.attention.q.parameters():
                p.zero_()
    batch = sample(config, 3, 12, seed, padding, spans)
    image = batch.ids >= config.image_start
    for kind, row in observations.attention_received(model, batch, "mmu").items():
        there = (batch.is_valid & (image if kind == "image" else ~image)).any()
        assert torch.allclose(row, torch.ones(N_LAYER)) if there else row.isnan().all()


def test_a_kind_that_is_not_there():
    config = tiny("emu3")
    batch = sample(config, 1, 5, 0)._replace(ids=torch.full((1, 5), 3))
    got = observations.attention_received(build(config), batch, "mmu")
    assert got["image"].isnan().all() and torch.allclose(got["text"], torch.ones(N_LAYER))



@few
@given(backbones, plans(), seeds)
def test_a_layer_left_out(backbone, plan, seed):
    """The same logits as a copy of the model whose plan skips the layer; the model keeps its
    plan and its weights.
    """
    config = tiny(backbone)
    model, batch = build(config, plan, seed), sample(config, 2, 7, seed)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    measure = lambda m: m(**batch.inputs(), task="t2i").logits
    with torch.no_grad():
        whole, without = observations.layer_importance(model, measure)
        assert torch.equal(whole, measure(model)) and len(without) == N_LAYER and model.plan == plan
        for layer, got in enumerate(without):
            keep = {task: [0.0 if n == layer else k for n, k in enumerate(row)] for task, row in plan.keep.items()}
            twin = build(config, Plan(keep, plan.shared_router), seed)
            twin.load_state_dict({name: x for name, x in before.items() if name in twin.state_dict()})
            assert torch.equal(got, measure(twin))
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_no_layer_is_judged_with_dropout():
    """A model that is being trained is measured as it would answer, and trains on."""
    model, batch = build(tiny("emu3", attention_dropout=0.5)), sample(tiny("emu3"), 2, 7, 0)
    measure = lambda m: m(**batch.inputs(), task="mmu").logits
    wanted, without = observations.layer_importance(model, measure)
    again = observations.layer_importance(model.train(), measure)
    assert model.training and torch.equal(wanted, again[0]) and all(map(torch.equal, without, again[1]))


def test_a_layer_that_does_nothing_is_not_missed():
    model, batch = build(tiny("showo")), sample(tiny("showo"), 2, 7, 0)
    with torch.no_grad():
        for p in (*model.blocks[1].attention.out.parameters(), *model.blocks[1].mlp.down.parameters()):
            p.zero_()
        whole, without = observations.layer_importance(model, lambda m: m(**batch.inputs(), task="mmu").logits)
    assert [torch.equal(whole, x) for x in without] == [False, True, False]



def routers(config, seed=0):
    torch.manual_seed(seed)
    out = {layer: TaskRouter(config.d_model, 0, ()).double() for layer in range(1, config.n_layer, 2)}
    for router in out.values():
        torch.nn.init.normal_(router.score.weight, std=config.d_model ** -0.5)
    return out


@few
@given(backbones, paddings, st.floats(0, 1), seeds)
def test_the_pool_is_shared_exactly(backbone, padding, share, seed):
    """Of all valid tokens of both tasks together, floor(share n + 1/2) win, at least one."""
    config = tiny(backbone)
    batches = {"t2i": sample(config, 2, 9, seed, padding), "mmu": sample(config, 3, 7, seed + 1, padding)}
    _, shares = observations.compete(build(config, seed=seed), routers(config), batches, share)
    count = {task: int(batch.is_valid.sum()) for task, batch in batches.items()}
    total = sum(count.values())
    won = sum(shares[task, 1] * n for task, n in count.items())
    assert set(shares) == {("t2i", 1), ("mmu", 1)} and round(won, 3) == max(1, capacity(share, total))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_when_all_win_the_model_is_dense(backbone):
    config = tiny(backbone)
    model, batches = build(config), {task: sample(config, 2, 9, n, "left") for n, task in enumerate(("t2i", "mmu"))}
    losses, _ = observations.compete(model, routers(config), batches, 1.0)
    for task, batch in batches.items():
        logits = model(**batch.inputs(), task=task).logits
        assert losses[task].item() == pytest.approx(cross_entropy(logits, batch.labels).item())


@pytest.mark.parametrize("backbone", BACKBONES)
def test_winners_update_and_learn(backbone, monkeypatch):
    """Without noise, by hand: x + u for the winners alone, with all tokens as keys; the gradient
    is a sigmoid's.
    """
    config = tiny(backbone)
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.full_like(x, 0.5))
    model, own = build(config), routers(config)
    batches = {task: sample(config, 2, 9, n, "left") for n, task in enumerate(("t2i", "mmu"))}
    losses, _ = observations.compete(model, own, batches, 0.4)
    got = torch.autograd.grad(losses["t2i"] + losses["mmu"], own[1].score.bias)[0]

    contexts = {task: model.context(b.ids, None, b.spans, b.valid) for task, b in batches.items()}
    x = {task: model.embed_tokens(b.ids, b.valid) for task, b in batches.items()}
    x = {task: x[task] + model.blocks[0](x[task], c.rope, c.mask) for task, c in contexts.items()}
    r = {task: own[1].score(x[task]).squeeze(-1).detach() for task in x}
    pool = sorted((v for task, b in batches.items() for v in r[task][b.is_valid].tolist()), reverse=True)
    least = pool[capacity(0.4, len(pool)) - 1]
    wanted, m = 0.0, {task: (r[task] >= least).double().requires_grad_() for task in r}
    for task, c in contexts.items():
        y = x[task] + m[task][..., None] * model.blocks[1](x[task], c.rope, c.mask)
        y = y + model.blocks[2](y, c.rope, c.mask)
        loss = cross_entropy(model.head(model.norm(y)), batches[task].labels)
        assert loss.item() == pytest.approx(losses[task].item())
        s = torch.sigmoid(r[task] - least)
        wanted += (torch.autograd.grad(loss, m[task])[0] * s * (1 - s)).sum().item()
    assert got.item() == pytest.approx(wanted)


def test_the_task_whose_loss_counts_wins():
    """Only one task's loss counts and its odd layer is needed: its tokens win.

    The model is left as it was.
    """
    config = tiny("emu3", n_layer=2)
    model = build(config, dtype=torch.float32)
    ids = {task: torch.randint(n, n + 5, (8, 10), generator=torch.Generator().manual_seed(n)) for n, task in
           ((0, "t2i"), (10, "mmu"))}
    with torch.no_grad():
        # what the whole model says
        labels = {task: model(x, task=task).logits.argmax(-1) for task, x in ids.items()}
    batches = {task: Batch(x, None, None, labels[task]) for task, x in ids.items()}
    before = {name: x.clone() for name, x in model.state_dict().items()}
    for winner, loser in (("t2i", "mmu"), ("mmu", "t2i")):
        torch.manual_seed(0)
        won = observations.competition(model, lambda: batches, 60, {winner: 1.0, loser: 0.0}, lr=0.05)
        assert won[winner][0] is None and won[winner][1] > 0.7 > 0.3 > won[loser][1]
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("weights, autocast", [(torch.float32, True), (torch.bfloat16, False), (torch.float16, False)])
def test_competition_in_low_precision(weights, autocast):
    """Scores are compared in float32: no ties, half of the tokens win, whatever the dtype of the
    model.
    """
    config = tiny("emu3")
    model, batch = build(config, dtype=weights), sample(config, 8, 40, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        won = observations.competition(model.train(), lambda: {"t2i": batch, "mmu": batch}, 2, {"t2i": 1, "mmu": 1}, counted=3)
    assert won["t2i"][1] + won["mmu"][1] == pytest.approx(1, abs=1e-6) and model.training


def test_what_competition_refuses():
    """A model that prunes already, one without an odd layer, a task that it does not know, ids
    that it does not have.
    """
    config = tiny("emu3")
    batch = sample(config, 1, 5, 0)
    for model in (build(config, Plan.interleaved(N_LAYER)), build(tiny("emu3", n_layer=1))):
        with pytest.raises(ValueError, match="a dense model of two layers or more is needed"):
            observations.competition(model, lambda: {"mmu": batch}, 1, {"mmu": 1.0})
    for wrong in ({"steps": -1}, {"counted": 0}, {"share": 1.5}, {"share": 0.0}):
        with pytest.raises(ValueError, match="competition: steps must be at least 0, counted at least 1 and share in"):
            observations.competition(build(config), lambda: {"mmu": batch}, **{"steps": 1, "weights": {"mmu": 1.0}} | wrong)
    with pytest.raises(ValueError, match="unknown task 'lm'"):
        observations.competition(build(config, Plan.dense(N_LAYER)), lambda: {"lm": batch}, 1, {"lm": 1.0})
    with pytest.raises(ValueError, match="the vocabulary is"):
        observations.attention_received(build(config), batch._replace(ids=batch.ids + config.vocab_size), "mmu")

"""benchmarks/observations.py: attention received, layers left out, competing tasks."""
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import observations
from helpers import BACKBONES, N_LAYER, build, call, naive_sees, plans, real, seeds, tiny
from unimod_mini.objectives import cross_entropy
from unimod_mini.plan import Plan, capacity
from unimod_mini.routers import TaskRouter
from unimod_mini.tokenizer import IGNORE, Batch

backbones = st.sampled_from(BACKBONES)
paddings = st.sampled_from(("none", "left", "right", "both", "holes"))
few = settings(max_examples=15)


def sample(config, rows, length, seed, padding="none", spans=False):
    """A Batch of random ids; every valid token has a random label."""
    inputs = call(config, rows, length, seed, padding, spans)
    ids, generator = inputs["ids"], torch.Generator().manual_seed(seed)
    labels = torch.randint(config.vocab_size, ids.shape, generator=generator)
    labels = labels.masked_fill(~real(inputs), IGNORE)
    return Batch(ids, inputs.get("spans"), inputs.get("valid"), labels)


def both_tasks(config):
    return {task: sample(config, 2, 9, n, "left") for n, task in enumerate(("t2i", "mmu"))}


# --- Attention received ---

@few
@given(backbones, paddings, st.booleans(), seeds)
def test_attention_received_pair_by_pair(backbone, padding, spans, seed):
    """The mean, one pair after the other, of (tokens that i sees) x (attention of i to j), from
    the q and k that run."""
    config, caught, attend = tiny(backbone), [], F.scaled_dot_product_attention
    batch, model = sample(config, 2, 9, seed, padding, spans), build(config, seed=seed)

    def record(q, k, v, **rest):
        caught.append((q, k))
        return attend(q, k, v, **rest)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(F, "scaled_dot_product_attention", record)
        model(**batch.inputs(), task="t2i")
    got = observations.attention_received(model, batch, "t2i")
    positions = model.context(batch.ids, None, batch.spans, batch.valid).positions
    span = torch.zeros_like(batch.ids) if batch.spans is None else batch.spans
    for layer, (q, k) in enumerate(caught):
        H, group = q.shape[1], q.shape[1] // k.shape[1]
        values = {kind: [] for kind in observations.KINDS}
        for b, row in enumerate(batch.ids):
            keys = batch.is_valid[b]
            for i in keys.nonzero().flatten().tolist():
                seen = [j for j in range(9) if naive_sees(i, j, positions[b], span[b], keys)]
                mean = torch.zeros(len(seen), dtype=q.dtype)
                for h in range(H):
                    scores = torch.stack([q[b, h, i] @ k[b, h // group, j] for j in seen])
                    mean += (scores / config.head_width ** 0.5).softmax(0) / H
                for j, weight in zip(seen, mean.tolist()):
                    kind = "image" if row[j] >= config.image_start else "text"
                    values[kind].append(len(seen) * weight)
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


# --- Without a layer ---

@few
@given(backbones, plans(), seeds)
def test_a_layer_left_out(backbone, plan, seed):
    """The same logits as a copy of the model whose plan skips the layer; the model is unchanged."""
    config = tiny(backbone)
    model, batch = build(config, plan, seed), sample(config, 2, 7, seed)
    before = {name: x.clone() for name, x in model.state_dict().items()}

    def measure(m):
        return m(**batch.inputs(), task="t2i").logits

    with torch.no_grad():
        whole, without = observations.layer_importance(model, measure)
        assert torch.equal(whole, measure(model)) and len(without) == N_LAYER
        for layer, got in enumerate(without):
            keep = {task: list(row) for task, row in plan.keep.items()}
            for row in keep.values():
                row[layer] = 0.0
            twin = build(config, Plan(keep, plan.shared_router), seed)
            twin.load_state_dict({name: before[name] for name in twin.state_dict()})
            assert torch.equal(got, measure(twin))
    assert model.plan == plan
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_no_layer_is_judged_with_dropout():
    """A model that is being trained is measured as it would answer, and trains on."""
    config = tiny("emu3", attention_dropout=0.5)
    model, batch = build(config), sample(config, 2, 7, 0)

    def measure(m):
        return m(**batch.inputs(), task="mmu").logits

    whole, without = observations.layer_importance(model, measure)
    again = observations.layer_importance(model.train(), measure)
    assert model.training and torch.equal(whole, again[0])
    assert all(map(torch.equal, without, again[1]))


def test_a_layer_that_does_nothing_is_not_missed():
    model, batch = build(tiny("showo")), sample(tiny("showo"), 2, 7, 0)
    block = model.blocks[1]
    with torch.no_grad():
        for p in (*block.attention.out.parameters(), *block.mlp.down.parameters()):
            p.zero_()
        whole, without = observations.layer_importance(
            model, lambda m: m(**batch.inputs(), task="mmu").logits)
    assert [torch.equal(whole, x) for x in without] == [False, True, False]


# --- Competition ---

def routers(config, seed=0):
    torch.manual_seed(seed)
    out = {}
    for layer in range(1, config.n_layer, 2):
        out[layer] = TaskRouter(config.d_model, 0, ()).double()
        torch.nn.init.normal_(out[layer].score.weight, std=config.d_model ** -0.5)
    return out


@few
@given(backbones, paddings, st.floats(0, 1), seeds)
def test_the_pool_is_shared_exactly(backbone, padding, share, seed):
    """Of all valid tokens of both tasks together, floor(share n + 1/2) win, at least one."""
    config = tiny(backbone)
    batches = {"t2i": sample(config, 2, 9, seed, padding),
               "mmu": sample(config, 3, 7, seed + 1, padding)}
    _, shares = observations.compete(build(config, seed=seed), routers(config), batches, share)
    count = {task: int(batch.is_valid.sum()) for task, batch in batches.items()}
    total = sum(count.values())
    won = sum(shares[task, 1] * n for task, n in count.items())
    assert set(shares) == {("t2i", 1), ("mmu", 1)}
    assert round(won, 3) == max(1, capacity(share, total))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_when_all_win_the_model_is_dense(backbone):
    config = tiny(backbone)
    model, batches = build(config), both_tasks(config)
    losses, _ = observations.compete(model, routers(config), batches, 1.0)
    for task, batch in batches.items():
        logits = model(**batch.inputs(), task=task).logits
        assert losses[task].item() == pytest.approx(cross_entropy(logits, batch.labels).item())


@pytest.mark.parametrize("backbone", BACKBONES)
def test_winners_update_and_learn(backbone, monkeypatch):
    """Without noise, by hand: x + u for the winners alone, with all tokens as keys; the gradient
    is a sigmoid's."""
    config = tiny(backbone)
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.full_like(x, 0.5))
    model, own = build(config), routers(config)
    batches = both_tasks(config)
    losses, _ = observations.compete(model, own, batches, 0.4)
    got = torch.autograd.grad(losses["t2i"] + losses["mmu"], own[1].score.bias)[0]

    contexts, x, r, pool = {}, {}, {}, []
    for task, b in batches.items():
        contexts[task] = c = model.context(b.ids, None, b.spans, b.valid)
        x[task] = model.embed_tokens(b.ids, b.valid)
        x[task] = x[task] + model.blocks[0](x[task], c.rope, c.mask)
        r[task] = own[1].score(x[task]).squeeze(-1).detach()
        pool += r[task][b.is_valid].tolist()
    least, wanted = sorted(pool, reverse=True)[capacity(0.4, len(pool)) - 1], 0.0
    for task, c in contexts.items():
        m = (r[task] >= least).double().requires_grad_()
        y = x[task] + m[..., None] * model.blocks[1](x[task], c.rope, c.mask)
        y = y + model.blocks[2](y, c.rope, c.mask)
        loss = cross_entropy(model.head(model.norm(y)), batches[task].labels)
        assert loss.item() == pytest.approx(losses[task].item())
        s = torch.sigmoid(r[task] - least)
        wanted += (torch.autograd.grad(loss, m)[0] * s * (1 - s)).sum().item()
    assert got.item() == pytest.approx(wanted)


def test_the_task_whose_loss_counts_wins():
    """Only one task's loss counts and its odd layer is needed: its tokens win. The model is left
    as it was."""
    config = tiny("emu3", n_layer=2)
    model, batches = build(config, dtype=torch.float32), {}
    for first, task in ((0, "t2i"), (10, "mmu")):
        generator = torch.Generator().manual_seed(first)
        ids = torch.randint(first, first + 5, (8, 10), generator=generator)
        with torch.no_grad():
            labels = model(ids, task=task).logits.argmax(-1)               # what the model says
        batches[task] = Batch(ids, None, None, labels)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    for winner, loser in (("t2i", "mmu"), ("mmu", "t2i")):
        torch.manual_seed(0)
        weights = {winner: 1.0, loser: 0.0}
        won = observations.competition(model, lambda: batches, 60, weights, lr=0.05)
        assert won[winner][0] is None and won[winner][1] > 0.7 > 0.3 > won[loser][1]
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("weights, autocast", [
    (torch.float32, True), (torch.bfloat16, False), (torch.float16, False)])
def test_competition_in_low_precision(weights, autocast):
    """Scores are compared in float32: no ties, half of the tokens win, whatever the dtype."""
    config = tiny("emu3")
    model, batch = build(config, dtype=weights), sample(config, 8, 40, 0)
    batches = {"t2i": batch, "mmu": batch}
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        won = observations.competition(model.train(), lambda: batches, 2, {"t2i": 1, "mmu": 1},
                                       counted=3)
    assert won["t2i"][1] + won["mmu"][1] == pytest.approx(1, abs=1e-6) and model.training

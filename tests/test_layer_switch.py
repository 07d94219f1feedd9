"""unimod_mini.layer_switch: the rank of attention, and plans that meet a budget."""
import importlib
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st

from unimod_mini.config import ModelConfig
from unimod_mini.flops import count_flops, flops_ratio
from unimod_mini.plan import Plan
from unimod_mini.tokenizer import Batch, Palette, Tokenizer, WordText
from unimod_mini.transformer import UnifiedTransformer

# the package has a function of the same name
switch = importlib.import_module("unimod_mini.layer_switch")
BACKBONES, MEASURES = ("showo", "emu3"), ("rank", "energy")
both = pytest.mark.parametrize("backbone", BACKBONES)
CONFIG = {name: replace(ModelConfig.preset(f"toy-{name}"), d_model=64, d_ff=160) for name in BACKBONES}
LENGTHS = {"t2i": 200, "mmu": 250}
BUDGETS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)


def make(backbone, n_layer=3, seed=0):
    """A tokenizer with six patches and a random dense model."""
    patches = torch.randint(256, (6, 2, 2, 3), generator=torch.Generator().manual_seed(1))
    tokens = Tokenizer(backbone, WordText("a b c d 3*3 sys asst".split()), Palette(patches), (3, 3), 8, "sys", "asst")
    config = ModelConfig(backbone, n_layer, 4, 4 if backbone == "showo" else 2, 32, 48, tokens.vocab_size, 64,
                         image_start=tokens.image_start, rope_fraction=0.5 if backbone == "showo" else 1.0,
                         qk_norm=backbone == "showo")
    torch.manual_seed(seed)
    model = UnifiedTransformer(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                weight.normal_(std=1.0 if "embed" in name else 0.2)
    return tokens, model


def samples(tokens, n=3, seed=0):
    """{task: Batch} with texts of different lengths."""
    codes = torch.randint(6, (n, 3, 3), generator=torch.Generator().manual_seed(seed))
    texts = ["a b c d", "a", "c c", "b d a"][:n]
    return {"t2i": tokens.t2i(texts, codes), "mmu": tokens.mmu(texts, ["c"] * n, codes)}


def flatten(model, layer):
    """Make the attention scores of one layer low-rank by construction (1 for showo, at most 2
    for emu3).
    """
    attention, d = model.blocks[layer].attention, model.config.head_width
    with torch.no_grad():
        if model.config.backbone == "showo":  # a query is one unrotated direction: q_i = s_i e_d
            attention.q_norm.weight[:-1] = 0.0
            attention.q_norm.bias.zero_()
        else:  # a query lives in one rotated plane, spanned by e_0, e_(d/2)
            rows = torch.arange(attention.q.weight.shape[0])
            attention.q.weight[(rows % d != 0) & (rows % d != d // 2)] = 0.0


def ratio(config, plan, lengths, mode="train"):
    """Counted FLOPs of the plan over those of the dense model, one sample of each task."""
    def total(plan):
        return sum(count_flops(config, plan, task, n, mode).total for task, n in lengths.items())
    return total(plan) / total(None)


def tables(n_layer=8):
    row = st.lists(st.floats(0.02, 1.0), min_size=n_layer, max_size=n_layer)
    return st.fixed_dictionaries({"t2i": row, "mmu": row})



@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.sampled_from([0.3, 0.01, 1e-6]),
       st.integers(0, 10**6))
def test_rank_of(rows, columns, inner, tolerance, seed):
    """"rank" is torch.linalg.matrix_rank at that relative tolerance; "energy" is the smallest r
    whose r largest singular values hold 1 - tolerance of the energy, found by adding them one by
    one.
    """
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(4, n, inner, generator=generator, dtype=torch.float64) for n in (rows, columns))
    matrix = a * torch.rand(inner, generator=generator, dtype=torch.float64)**3 @ b.mT
    singular = torch.linalg.svdvals(matrix)
    assert switch.rank_of(singular, "rank", tolerance).tolist() == torch.linalg.matrix_rank(
        matrix, rtol=tolerance).tolist()
    for values, got in zip(singular.tolist(), switch.rank_of(singular, "energy", tolerance).tolist()):
        squares, held, needed = [s * s for s in values], 0.0, 0
        while held < (1 - tolerance) * sum(squares) * (1 - 1e-14):
            held, needed = held + squares[needed], needed + 1
        assert got == needed


def test_rank_of_by_hand():
    """Squares 64, 25, 9, 1 and 1 hold 64, 89, 98, 99 and 100 percent."""
    singular = torch.tensor([8.0, 5.0, 3.0, 1.0, 1.0])
    wanted = {0.5: 1, 0.3: 2, 0.1: 3, 0.015: 4, 0.005: 5}
    assert {t: int(switch.rank_of(singular, "energy", t)) for t in wanted} == wanted
    wanted = {0.9: 1, 0.5: 2, 0.2: 3, 0.1: 5}
    assert {t: int(switch.rank_of(singular, "rank", t)) for t in wanted} == wanted
    with pytest.raises(ValueError, match='"rank" or "energy".*\'norm\''):
        switch.rank_of(singular, "norm", 0.1)


@both
@pytest.mark.parametrize("measure", MEASURES)
def test_arank_is_the_rank_of_the_attention_that_runs(backbone, measure, monkeypatch):
    """Queries and keys are caught inside the forward; the mean rank over heads and samples, over
    T, is the ARank.
    """
    tokens, model = make(backbone)
    for task, batch in samples(tokens).items():
        caught, attend = [], F.scaled_dot_product_attention
        monkeypatch.setattr(F, "scaled_dot_product_attention",
                            lambda q, k, v, **rest: (caught.append((q, k)), attend(q, k, v, **rest))[1])
        with torch.no_grad():
            model(**batch.inputs(), task=task)
        monkeypatch.undo()
        slow = []
        for q, k in caught:
            total = 0.0
            for b in range(len(q)):
                real = batch.valid[b].nonzero().flatten()
                for h in range(q.shape[1]):
                    scores = q[b, h][real] @ k[b, h * k.shape[1] // q.shape[1]][real].T
                    rank = (torch.linalg.matrix_rank(scores, rtol=0.2) if measure == "rank" else
                            switch.rank_of(torch.linalg.svdvals(scores), "energy", 0.2))
                    total += float(rank) / len(real)
            slow.append(total / len(q) / q.shape[1])
        got = switch.arank(model, batch, task, measure, 0.2)
        assert got.shape == (3,) and torch.allclose(got, torch.tensor(slow), atol=1e-3)
        assert len(set(slow)) > 1


@both
@pytest.mark.parametrize("measure", MEASURES)
@given(st.integers(0, 10**6))
def test_arank_lies_in_0_1(backbone, measure, seed):
    """Every value is in (0, 1] and at most head width over length; a table has a row of plain
    floats a task.
    """
    tokens, model = make(backbone, seed=seed)
    batches = samples(tokens, seed=seed)
    table = switch.arank_table(model, batches, measure)
    assert list(table) == ["t2i", "mmu"] and all(len(row) == 3 for row in table.values())
    assert all(type(value) is float and 0.0 < value <= 1.0 for row in table.values() for value in row)
    alone = Batch(torch.tensor([[3]]), None, None, torch.tensor([[3]]))
    assert switch.arank(model, alone, "lm", measure).tolist() == [1.0] * 3


def test_weights_that_are_not_numbers():
    """NaN in a layer: an error that names it, instead of one of the singular values."""
    tokens, model = make("emu3")
    model.blocks[1].attention.q.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="the scores of layer 1 for t2i are not finite: look at the model's weights"):
        switch.layer_switch(model, samples(tokens), 0.8)


def test_samples_that_have_no_rank():
    """A row of padding alone, and a tolerance that no singular value could or all would exceed:
    ValueError.
    """
    tokens, model = make("emu3")
    batch = samples(tokens)["mmu"]
    batch.valid[1] = False
    with pytest.raises(ValueError, match="sample 1 of mmu is all padding: leave it out"):
        switch.layer_switch(model, {"mmu": batch}, 0.9)
    for tolerance in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"tolerance must lie in \[0, 1\), got "):
            switch.rank_of(torch.ones(3), "rank", tolerance)


@both
@pytest.mark.parametrize("measure", MEASURES)
def test_padding_adds_no_rank(backbone, measure):
    """A padded row has the ARank of the same row without its padding; a batch has the mean of
    its rows.
    """
    tokens, model = make(backbone)
    for task, batch in samples(tokens, n=4).items():
        trimmed = []
        for b in range(4):
            real = batch.valid[b]
            row = Batch(*(None if t is None else t[b:b + 1, real] for t in batch))._replace(valid=None)
            trimmed.append(switch.arank(model, row, task, measure))
            one = Batch(*(None if t is None else t[b:b + 1] for t in batch))
            assert torch.allclose(switch.arank(model, one, task, measure), trimmed[-1], atol=1e-3)
        assert not batch.valid.all()
        assert torch.allclose(switch.arank(model, batch, task, measure), torch.stack(trimmed).mean(0), atol=1e-3)


@both
@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_low_rank_layer_is_ranked_lowest(backbone, measure, layer):
    """A layer whose queries are confined to a line or a plane has the lowest ARank of all, and
    is pruned the most.
    """
    tokens, model = make(backbone)
    batches = samples(tokens)
    before = switch.arank_table(model, batches, measure)
    flatten(model, layer)
    for task, row in switch.arank_table(model, batches, measure).items():
        assert row[layer] == min(row) and row[layer] < 0.5 * min(before[task])
        assert sorted(row)[1] > 1.5 * row[layer] and row[:layer] == before[task][:layer]
    plan = switch.layer_switch(model, batches, budget=0.8, measure=measure)
    for keep in plan.keep.values():
        assert keep[layer] == min(keep) < 1.0


def test_arank_measures_the_model_at_rest():
    """Attention dropout of a model left in training mode does not make the ranks random."""
    tokens, model = make("emu3")
    dropping = UnifiedTransformer(replace(model.config, attention_dropout=0.5))
    dropping.load_state_dict(model.state_dict())
    batches = samples(tokens)
    assert switch.arank_table(dropping.train(), batches) == switch.arank_table(model.eval(), batches)



@both
@given(tables(), st.sampled_from(BUDGETS))
def test_plans_meet_their_budget(backbone, table, budget):
    """Counted training FLOPs lie at most one percent under the budget and never above it; every
    row has L ratios.
    """
    plan = switch.plan_from_arank(table, CONFIG[backbone], LENGTHS, budget)
    assert isinstance(plan, Plan) and plan.tasks == tuple(table) and plan.n_layer == 8 and not plan.shared_router
    assert budget - 0.01 <= ratio(CONFIG[backbone], plan, LENGTHS) <= budget


@given(tables(), st.sampled_from(BUDGETS))
def test_the_less_rank_the_less_is_kept(table, budget):
    """Within a task keep never falls where rho rises, and at least one layer of some task is
    pruned.
    """
    plan = switch.plan_from_arank(table, CONFIG["showo"], LENGTHS, budget)
    for task, row in table.items():
        keeps = [keep for _, keep in sorted(zip(row, plan.keep[task]))]
        assert keeps == sorted(keeps)
    assert min(map(min, plan.keep.values())) < 1.0


@pytest.mark.parametrize("budget", [0.6, 0.7, 0.8, 0.9])
def test_switched_layers_keep_rho(budget):
    """Layers switch one after the other from keep 1 to keep rho, in the order of rho over their
    task's mean; at most two are half-way. (Every layer at its rho costs 0.5 here, so no budget of
    this test scales them.)
    """
    table = {"t2i": [0.30, 0.62, 0.34, 0.54, 0.38, 0.58, 0.46, 0.50],
             "mmu": [0.20, 0.60, 0.63, 0.25, 0.31, 0.66, 0.36, 0.43]}
    plan = switch.plan_from_arank(table, CONFIG["showo"], LENGTHS, budget)
    order = sorted((rho * 8 / sum(row), rho, plan.keep[task][n]) for task, row in table.items()
                   for n, rho in enumerate(row))
    state = ["switched" if abs(keep - rho) < 0.0011 else "dense" if keep == 1.0 else "half" for _, rho, keep in order]
    assert state == sorted(state, key=["switched", "half", "dense"].index)
    assert state.count("half") <= 2 and "switched" in state and "dense" in state


def test_a_low_budget_scales_all_keeps():
    """Where rho everywhere still costs too much, every keep is rho times one common factor."""
    table = {"t2i": [0.1 * n for n in range(3, 11)], "mmu": [0.9, 0.7] * 4}
    plan = switch.plan_from_arank(table, CONFIG["showo"], LENGTHS, 0.4)
    factors = [keep / rho for task, row in table.items() for rho, keep in zip(row, plan.keep[task])]
    assert max(factors) - min(factors) < 0.005 and max(factors) < 0.95
    assert 0.39 <= ratio(CONFIG["showo"], plan, LENGTHS) <= 0.4


@given(tables(), st.floats(0.02, 0.99))
# mmu's layer 1 stands above t2i's first
@example({"t2i": [1.0] * 8, "mmu": [1.0, 1.0, *[0.04] * 6]}, 0.2)
def test_a_first_layer_that_stands_out_stays_dense_while_the_others_can_pay(table, budget):
    """With the highest rank of its task, whatever the other's are, it is touched only when
    nothing else is left.
    """
    config = CONFIG["emu3"]
    table = {task: [1.0, *(0.5 * rho for rho in row[1:])] for task, row in table.items()}
    gap = min(8 * (row[0] - max(row[1:])) / sum(row) for row in table.values())
    if budget <= switch.least_cost(config, LENGTHS) or gap < 2 * switch.SOFTNESS:
        return
    plan = switch.plan_from_arank(table, config, LENGTHS, budget)
    alone = ratio(config, Plan(dict.fromkeys(LENGTHS, (1.0, *[0.0] * 7))), LENGTHS)
    for keeps in plan.keep.values():
        assert keeps[0] == 1.0 or (not any(keeps[1:]) and budget < alone)
    assert budget - 0.015 <= ratio(config, plan, LENGTHS) <= budget


@given(tables(), st.sampled_from(BUDGETS), st.permutations(range(1, 8)))
def test_permuting_the_table_permutes_the_plan(table, budget, order):
    """The plan depends on the ranks, not on where in the stack a layer stands, the first one
    apart.
    """
    order = [0, *order]
    plan = switch.plan_from_arank(table, CONFIG["emu3"], LENGTHS, budget)
    permuted = switch.plan_from_arank({task: [row[i] for i in order] for task, row in table.items()}, CONFIG["emu3"],
                                      LENGTHS, budget)
    for task, row in plan.keep.items():
        assert permuted.keep[task] == pytest.approx([row[i] for i in order], abs=0.003)


def test_another_table_gives_another_plan():
    """Reversing the ranks of one task changes its row; tasks of equal length swap their rows
    when the ranks swap.
    """
    ramp, flat, config = [0.1 * n for n in range(1, 9)], [0.3, 0.5] * 4, CONFIG["showo"]
    plan = switch.plan_from_arank({"t2i": ramp, "mmu": flat}, config, LENGTHS, 0.7)
    back = switch.plan_from_arank({"t2i": ramp[::-1], "mmu": flat}, config, LENGTHS, 0.7)
    assert back.keep["t2i"] == pytest.approx(plan.keep["t2i"][::-1], abs=0.003)
    assert back.keep["mmu"] == pytest.approx(plan.keep["mmu"], abs=0.003) and plan.keep["t2i"][0] < plan.keep["t2i"][7]
    equal = {"t2i": 200, "mmu": 200}
    one, two = (switch.plan_from_arank(dict(zip(("t2i", "mmu"), rows)), config, equal, 0.7).keep
                for rows in ((ramp, flat), (flat, ramp)))
    assert one["t2i"] == pytest.approx(two["mmu"], abs=0.003) and one["mmu"] == pytest.approx(two["t2i"], abs=0.003)
    assert one["t2i"] != one["mmu"]


def test_a_larger_budget_keeps_more():
    """Ratios grow with the budget; a budget of 1 keeps everything."""
    table = {"t2i": [0.1 * n for n in range(1, 9)], "mmu": [0.5, 0.2] * 4}
    plans = [switch.plan_from_arank(table, CONFIG["showo"], LENGTHS, budget) for budget in (*BUDGETS, 1.0)]
    for less, more in zip(plans, plans[1:]):
        assert all(a <= b for task in table for a, b in zip(less.keep[task], more.keep[task])) and less != more
    assert plans[-1] == Plan.dense(8)


def test_one_task_and_three():
    """A table may have any tasks; the budget covers those of the table."""
    row = [0.1 * n for n in range(1, 9)]
    for tasks in (["mmu"], ["lm", "t2i", "mmu"]):
        lengths = dict.fromkeys(tasks, 140)
        plan = switch.plan_from_arank({task: row for task in tasks}, CONFIG["emu3"], lengths, 0.75)
        assert plan.tasks == tuple(tasks) and 0.74 <= ratio(CONFIG["emu3"], plan, lengths) <= 0.75


@pytest.mark.parametrize("table, budget", [
    ([0.5] * 8, 0.0), ([0.5] * 8, -0.1), ([0.5] * 8, 1.01), ([0.5] * 8, float("nan")), ([0.5] * 7 + [0.0], 0.8),
    ([0.5] * 7 + [-0.5], 0.8), ([0.5] * 7 + [1.5], 0.8), ([0.5] * 7 + [float("nan")], 0.8),
    ([0.5] * 7 + [float("inf")], 0.8), ([0.5] * 7, 0.8),
    ([0.5] * 8, 0.001)])
def test_impossible_plans(table, budget):
    """A budget outside (0, 1] or below the head's share, ranks that are no ranks, a row too
    short: ValueError.
    """
    with pytest.raises(ValueError, match="ARank over length must lie|no plan reaches|one keep ratio a layer"):
        switch.plan_from_arank({"t2i": table, "mmu": [0.5] * 8}, CONFIG["showo"], LENGTHS, budget)


@pytest.mark.parametrize("tasks", (("t2i",), ("t2i", "mmu", "lm")))
def test_every_task_needs_ranks_and_a_length(tasks):
    """One without the other would be pruned outside of the budget."""
    with pytest.raises(ValueError, match="ARank of .*, lengths of t2i, mmu: give both for every task"):
        switch.plan_from_arank({task: [0.5] * 8 for task in tasks}, CONFIG["showo"], {"t2i": 9, "mmu": 9}, 0.8)


@both
@pytest.mark.parametrize("budget", [0.6, 0.85])
def test_layer_switch(backbone, budget):
    """From a model and its samples to a plan within the budget for exactly these lengths; the
    model runs with it.
    """
    tokens, model = make(backbone, n_layer=4)
    batches = samples(tokens)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    plan = switch.layer_switch(model, batches, budget)
    lengths = {task: batch.ids.shape[1] for task, batch in batches.items()}
    assert plan == switch.plan_from_arank(switch.arank_table(model, batches), model.config, lengths, budget)
    assert ratio(model.config, plan, lengths) <= budget and plan.tasks == ("t2i", "mmu")
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    counts = {"t2i": 3, "mmu": 1}
    mixed = switch.layer_switch(model, batches, budget, counts=counts)
    assert mixed == switch.plan_from_arank(switch.arank_table(model, batches), model.config, lengths, budget, counts)
    assert budget - 0.02 < flops_ratio(model.config, mixed, lengths, "train", counts) <= budget
    routed = model.with_plan(plan)
    assert all(torch.isfinite(routed(**batch.inputs(), task=task).logits).all() for task, batch in batches.items())


@pytest.mark.parametrize("budget", BUDGETS)
def test_every_method_of_the_comparison(budget):
    """unimod and mod meet the budget closely, one_router has unimod's plan, one_plan the plan of
    the tasks' mean, the other methods are their fixed plans, a misspelt one is an error.
    """
    table, config = {"t2i": [0.1 * n for n in range(1, 9)], "mmu": [0.5, 0.2] * 4}, CONFIG["showo"]
    plans = {name: switch.plan_for_budget(name, table, config, LENGTHS, budget) for name in switch.METHODS}
    assert plans["unimod"] == switch.plan_from_arank(table, config, LENGTHS, budget)
    assert plans["one_router"] == Plan(plans["unimod"].keep, shared_router=True) != plans["unimod"]
    mean = [(a + b) / 2 for a, b in zip(*table.values())]
    row = switch.plan_from_arank(dict.fromkeys(table, mean), config, LENGTHS, budget).keep["t2i"]
    assert plans["one_plan"] == Plan(dict.fromkeys(table, row), shared_router=True)
    assert plans["dense"] == Plan.dense(8) and plans["interleaved"] == Plan.interleaved(8)
    assert plans["early_exit"] == Plan.early_exit(8)
    everything = switch.plan_for_budget("mod", table, config, LENGTHS, 1.0)
    # though a router at keep 0.999 costs more than dense
    assert everything == Plan.mod(8, keep=1.0)
    mod, least = plans["mod"], ratio(config, Plan.mod(8, keep=0.0), LENGTHS)
    assert mod.shared_router and mod == Plan.mod(8, keep=mod.keep["t2i"][1])
    assert max(budget, least) - 0.01 <= ratio(config, mod, LENGTHS) <= max(budget, least)
    with pytest.raises(ValueError, match="unknown method.*early_exit"):
        switch.plan_for_budget("early-exit", table, config, LENGTHS, budget)

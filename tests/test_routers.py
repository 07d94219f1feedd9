"""plan.py and routers.py: plans, selection, gates, predictor, gather and add."""
import json
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from helpers import build, call, count, golden_order, keeps, naive_topk, plans, seeds, tiny
from unimod_mini.plan import TASKS, Plan, capacity
from unimod_mini.routers import (GATES, TaskRouter, add_tokens, descending_rank, flat,
                                 gather_tokens, predictor_loss, row_capacity, select_topk, slots,
                                 span_number, tie_order)


def random_valid(batch, length, seed, empty=True):
    """(B, T) bool, any pattern of padding; a row may be all padding when `empty`."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(batch, 1, generator=generator)
    valid = torch.rand(batch, length, generator=generator) < share
    return valid if empty else valid | (torch.arange(length) == length // 2)


def random_scores(batch, length, seed, how, dtype=torch.float32):
    """(B, T): distinct, full of ties, all equal, or full of NaN, infinities and signed zeros."""
    generator = torch.Generator().manual_seed(seed)
    if how == "equal":
        return torch.zeros(batch, length, dtype=dtype)
    if how == "distinct":
        return torch.randn(batch, length, generator=generator, dtype=torch.float64).to(dtype)
    pool = [0., 1, 2] if how == "ties" else [math.nan, math.inf, -math.inf, 0., -0., 1., -1e38]
    return torch.tensor(pool, dtype=dtype)[torch.randint(len(pool), (batch, length), generator=generator)]


HOWS = st.sampled_from(("distinct", "ties", "equal", "extreme"))
shapes = st.tuples(st.integers(1, 3), st.integers(1, 20))


def context(valid, length, batch=1, spans=None):
    """What a TaskRouter reads of the model's Context."""
    return SimpleNamespace(valid=valid, spans=spans, order=tie_order(batch, length, valid, None), n_future=0)


# ---------------------------------------------------------------- Plan

@pytest.mark.parametrize("keep, message", [
    ({"vqa": (1, 1)}, r"unknown task \['vqa'\], the tasks are t2i, mmu, lm"),
    ({"t2i": (1, 1), "mmu": (1,)}, r"one keep ratio a layer, got rows of length \{'t2i': 2, 'mmu': 1\}"),
    ({}, r"one keep ratio a layer, got rows of length \{\}"),
    ({"t2i": ()}, "one keep ratio a layer"),
    ({"t2i": (1, 1.1)}, r"keep ratios of 't2i' must lie in \[0, 1\], got \(1.0, 1.1\)"),
    ({"t2i": (1, 1), "mmu": (-0.1, 1)}, r"keep ratios of 'mmu' must lie in \[0, 1\]"),
    ({"t2i": (math.nan, 1)}, r"must lie in \[0, 1\], got \(nan, 1.0\)"),
    ({"t2i": 0.5}, r"keep must be \{task: \(a ratio for each layer\)\}.* got \{'t2i': 0.5\}"),
    ([(1, 1)], "keep must be"),
    (None, "keep must be"),
    ({"t2i": ("a", 1)}, "keep must be"),
])
def test_plan_rejects(keep, message):
    """A plan that cannot be right is a ValueError that says what is wrong."""
    with pytest.raises(ValueError, match=message):
        Plan(keep)


def test_plan_is_frozen_and_normal():
    """Rows become tuples of floats, so that equal plans are equal, and a field cannot be set."""
    plan = Plan({"t2i": [1, 0], "mmu": (1.0, 0.5)})
    assert plan == Plan({"t2i": (1.0, 0.0), "mmu": [1, 0.5]}) and plan.keep["t2i"] == (1.0, 0.0)
    assert plan != Plan(plan.keep, shared_router=True)
    assert (plan.tasks, plan.n_layer) == (("t2i", "mmu"), 2)
    with pytest.raises(AttributeError):
        plan.keep = {}


def test_equal_plans_are_one_key():
    """Plans serve in sets and as keys: equal ones, whatever the order of their tasks, have one
    hash.
    """
    a, b = Plan({"t2i": (1, 0.5), "mmu": (0, 1)}), Plan({"mmu": (0.0, 1.0), "t2i": (1.0, 0.5)})
    assert a == b and len({a, b, Plan({"t2i": (1, 0.5), "mmu": (0, 1)}, True)}) == 2


def test_plan_kinds_and_routed_tasks():
    """A layer is named after the tasks that prune there; only 0 < keep < 1 needs a router."""
    plan = Plan({"t2i": (1, .6, 1, .5, 0, 0), "mmu": (1, 1, .2, .5, 1, .9), "lm": (1, 1, 1, 1, 1, 1)})
    assert [plan.kind(i) for i in range(6)] == ["dense", "T2I-MoD", "MMU-MoD", "Shared-MoD", "T2I-MoD", "Shared-MoD"]
    assert [plan.routed(i) for i in range(6)] == [[], ["t2i"], ["mmu"], ["t2i", "mmu"], [], ["mmu"]]


def test_plan_constructors():
    """Every method of the comparison is a Plan."""
    assert Plan.dense(3).keep == {"t2i": (1, 1, 1), "mmu": (1, 1, 1)} and not Plan.dense(3).shared_router
    assert Plan.dense(2, ("lm",)).keep == {"lm": (1, 1)}
    assert Plan.mod(5, keep=.3).keep == dict.fromkeys(("t2i", "mmu"), (1, .3, 1, .3, 1))
    assert Plan.mod(5).shared_router and Plan.mod(2, ("lm",)).keep == {"lm": (1, .5)}
    assert Plan.interleaved(4).keep == dict.fromkeys(("t2i", "mmu"), (1, 0, 1, 0))
    assert Plan.early_exit(8).keep["mmu"] == (1,) * 6 + (0,) * 2
    assert Plan.early_exit(4, ("mmu",), exit_layer=1).keep == {"mmu": (1, 0, 0, 0)}
    assert Plan.early_exit(1).keep["t2i"] == (1,)
    assert Plan.early_exit(2, exit_layer=0).keep["t2i"] == (0, 0) and Plan.early_exit(2, exit_layer=2) == Plan.dense(2)
    for wrong in (-1, 3):
        with pytest.raises(ValueError, match=f"exit_layer must lie in 0 to 2, got {wrong}"):
            Plan.early_exit(2, exit_layer=wrong)


@given(plans(tasks=TASKS))
def test_plan_round_trip(tmp_path_factory, plan):
    """save then load gives an equal plan, and leaves no other file behind."""
    folder = tmp_path_factory.mktemp("plan")
    plan.save(folder / "plan.json")
    assert Plan.load(folder / "plan.json") == plan
    assert [path.name for path in folder.iterdir()] == ["plan.json"]
    # written by hand: shared_router has a default
    (folder / "own.json").write_text(json.dumps({"keep": plan.keep}))
    assert Plan.load(folder / "own.json") == Plan(plan.keep)


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"keep": 3, "shared_router": false}', '"plan"',
                                  json.dumps({"keep": {"t2i": [2.0]}, "shared_router": False})])
def test_load_names_the_file(tmp_path, text):
    """What is not a plan is a ValueError with the file's name."""
    (tmp_path / "odd.json").write_text(text)
    with pytest.raises(ValueError, match=r"odd\.json is not a plan"):
        Plan.load(tmp_path / "odd.json")


def test_plan_prints_a_table():
    """A header, then a line a layer: number, keep of every task, kind."""
    lines = str(Plan({"t2i": (1, .25), "mmu": (1, .5)})).splitlines()
    assert [line.split() for line in lines] == [["layer", "t2i", "mmu", "kind"], ["0", "1.000", "1.000", "dense"],
                                                ["1", "0.250", "0.500", "Shared-MoD"]]
    assert len({line.index(".") for line in lines[1:]}) == 1


# ---------------------------------------------------------------- capacity and ties

@given(keeps, st.integers(1, 5000))
def test_capacity_rounds_half_up(keep, n):
    """K = floor(keep T + 1/2): halves go up, 0 keeps none, 1 keeps all; the tensor twin gives
    the same integer.
    """
    assert capacity(keep, n) == count(keep, n) and capacity(0, n) == 0 and capacity(1, n) == n
    assert [capacity(0.5, m) for m in (1, 2, 3, 4, 5)] == [1, 1, 2, 2, 3]
    assert row_capacity(keep, torch.ones(1, n, dtype=torch.bool)).tolist() == [[count(keep, n)]]


@given(shapes, keeps, seeds)
def test_row_capacity_counts_valid_tokens(shape, keep, seed):
    """k_b = floor(keep T_b + 1/2) of each row, long (B, 1), never above K."""
    valid = random_valid(*shape, seed)
    k = row_capacity(keep, valid)
    assert k.dtype == torch.long and k.tolist() == [[count(keep, sum(row))] for row in valid.tolist()]
    assert int(k.max()) <= capacity(keep, shape[1])


def test_tie_order_of_eight():
    """The worked example of the docstring."""
    assert tie_order(1, 8, None, None).tolist() == [[0, 5, 2, 7, 4, 1, 6, 3]]


@given(shapes, seeds)
def test_tie_order_is_golden_and_puts_padding_last(shape, seed):
    """A permutation of each row: the valid tokens in golden order of their number, then padding."""
    valid = random_valid(*shape, seed)
    for order, row in zip(tie_order(*shape, valid, None).tolist(), valid.tolist()):
        assert sorted(order) == list(range(shape[1]))
        assert order[:sum(row)] == golden_order(row)
    assert torch.equal(tie_order(*shape, None, None), tie_order(*shape, torch.ones(shape, dtype=torch.bool), None))


@pytest.mark.parametrize("lengths, every", [(range(1, 90), 1), ((387, 1408, 4170), 97)])
def test_equal_scores_spread_evenly(lengths, every):
    """All scores equal: for every T and k the largest gap between kept tokens, the ends of the
    sequence included, is below 2 T / k and the largest gap between two neighbours at most 3 times
    the smallest (three-distance theorem).
    """
    for T in lengths:
        order = tie_order(1, T, None, None)[0]
        for k in range(1, T + 1, every):
            kept = order[:k].sort().values
            gaps = kept.diff()
            ends = torch.cat((kept[:1] + 1, gaps, T - kept[-1:]))
            assert ends.max() < 2 * T / k + (T == k), (T, k)
            assert k == 1 or gaps.max() <= 3 * gaps.min(), (T, k)


def test_equal_scores_favour_no_part():
    """All scores equal: every prefix of n of T_b valid tokens holds k n / T_b kept ones, give or
    take 2, also when the valid tokens are scattered among padding.
    """
    for T in range(1, 60, 3):
        for keep in (.1, .3, .5, .8):
            valid = random_valid(1, 2 * T, T, empty=False)
            selected = select_topk(torch.zeros(1, 2 * T), keep, valid)[2][valid].long()
            n = torch.arange(1, len(selected) + 1)
            assert ((selected.cumsum(0) - selected.sum() * n / len(selected)).abs() < 2).all()


# ---------------------------------------------------------------- selection

@given(shapes, keeps, seeds, HOWS, st.booleans(),
       st.sampled_from((torch.float32, torch.bfloat16, torch.float16, torch.float64)))
@example((2, 9), .5, 0, "equal", True, torch.bfloat16)
def test_select_topk_against_sorting(shape, keep, seed, how, padded, dtype):
    """Every row takes exactly its k_b = floor(keep T_b + 1/2) best valid tokens, whatever the ties,
    NaN or dtype; the used slots come first, ascend strictly and name the selected tokens; K =
    floor(keep T + 1/2) slots.
    """
    scores, valid = random_scores(*shape, seed, how, dtype), random_valid(*shape, seed + 1) if padded else None
    indices, live, selected = select_topk(scores, keep, valid)
    assert indices.shape == (shape[0], count(keep, shape[1])) and indices.dtype == torch.long
    assert (live is None) == (not padded)
    for b, row in enumerate(scores.float().tolist()):
        ok = valid[b].tolist() if padded else [True] * len(row)
        expected = naive_topk(row, count(keep, sum(ok)), ok)
        used = len(expected) if live is None else int(live[b].sum())
        assert indices[b, :used].tolist() == expected == selected[b].nonzero().squeeze(1).tolist()
        assert live is None or live[b].tolist() == [slot < used for slot in range(indices.shape[1])]
        assert len(set(indices[b].tolist())) == indices.shape[1]  # spare slots are other tokens


@given(shapes, keeps, seeds, HOWS, st.booleans(), st.integers(0, 9))
def test_what_the_finished_sequence_keeps_its_beginning_keeps(shape, keep, seed, how, padded, coming):
    """With `coming` tokens missing at its end, a row keeps as many as the finished row (or all),
    and of the tokens that are there all those that the finished row keeps.
    """
    batch, length = shape
    scores = random_scores(batch, length + coming, seed, how)
    valid = torch.cat((random_valid(batch, length, seed + 1), torch.ones(batch, coming, dtype=torch.bool)), 1)
    valid = valid if padded else torch.ones_like(valid)
    part = valid[:, :length] if padded else None
    finished = select_topk(scores, keep, valid if padded else None)[2]
    indices, live, selected = select_topk(scores[:, :length], keep, part, n_future=coming)
    assert not (finished[:, :length] & ~selected).any()
    for b in range(batch):
        there = int(valid[b, :length].sum())
        kept = min(there, count(keep, there + coming))
        assert selected[b].sum() == kept == (indices.shape[1] if live is None else live[b].sum())
        assert not (selected[b] & ~valid[b, :length]).any()


def test_rounding_noise_is_a_tie():
    """Scores are compared as float32: equal tokens of a float64 model, whose scores differ in the
    last bits by where they stand in the matrix product, still tie and are spread evenly.
    """
    noise = torch.linspace(0, 1e-12, 8, dtype=torch.float64)[None]
    assert select_topk(1 + noise, 0.5)[0].tolist() == select_topk(0 * noise, 0.5)[0].tolist() == [[0, 2, 5, 7]]


@given(shapes, keeps, seeds, HOWS)
def test_row_alone(shape, keep, seed, how):
    """A row of a padded batch selects the very tokens that it selects alone and without padding."""
    scores, valid = random_scores(*shape, seed, how), random_valid(*shape, seed + 1)
    selected = select_topk(scores, keep, valid)[2]
    for b in range(shape[0]):
        if valid[b].any():
            alone = select_topk(scores[b][valid[b]][None], keep)[2][0]
            assert torch.equal(selected[b][valid[b]], alone)


@given(shapes, seeds, HOWS)
def test_descending_rank(shape, seed, how):
    """The rank is the place in a sort by (ineligible, score descending, tie order)."""
    scores, order = random_scores(*shape, seed, how), tie_order(*shape, None, None)
    eligible = random_valid(*shape, seed + 1)
    rank = descending_rank(scores, order, eligible).tolist()
    everyone = [True] * shape[1]
    for b, ok in enumerate(eligible.tolist()):
        value = [-math.inf if math.isnan(s) else s for s in scores[b].tolist()]
        golden = golden_order(everyone)
        places = sorted(range(shape[1]), key=lambda i: (not ok[i], -value[i], golden.index(i)))
        assert [rank[b][i] for i in places] == list(range(shape[1]))


def test_slots_example():
    """The worked example of the docstring."""
    indices, live = slots(torch.tensor([[False, True, False, True]]), 3)
    assert indices.tolist() == [[1, 3, 0]] and live.tolist() == [[True, True, False]]


@given(shapes, seeds, st.data())
def test_slots_is_a_stable_partition(shape, seed, data):
    """Selected tokens first, the others after them, both ascending; live marks the selected
    ones; cut at K.
    """
    selected = random_valid(*shape, seed)
    n_slot = data.draw(st.integers(int(selected.sum(1).max()), shape[1]))
    indices, live = slots(selected, n_slot)
    for b, row in enumerate(selected.tolist()):
        expected = [i for i, s in enumerate(row) if s] + [i for i, s in enumerate(row) if not s]
        assert indices[b].tolist() == expected[:n_slot]
        assert live[b].tolist() == [slot < sum(row) for slot in range(n_slot)]


# ---------------------------------------------------------------- the causal rule

@given(shapes, keeps, seeds, st.sampled_from(("t2i", "mmu")), st.integers(0, 3), HOWS)
def test_causal_selection(shape, keep, seed, task, n_span, how):
    """Keep a valid token when predictor > threshold of the task. In t2i a span takes instead its
    own best, as many as the capacity of the tokens up to its end leaves beside those kept before
    it: at least none, at most all of it.
    """
    (batch, length), valid = shape, random_valid(*shape, seed)
    router = TaskRouter(4, 2, ("t2i", "mmu"))
    router.threshold_t2i += 0.3
    router.threshold_mmu -= 0.3
    scores, logits = random_scores(*shape, seed + 1, how), random_scores(*shape, seed + 2, "distinct")
    cuts = torch.randint(length + 1, (batch, 6), generator=torch.Generator().manual_seed(seed)).sort(1).values.tolist()
    # start and stop of each span
    runs = [[(row[2 * n], row[2 * n + 1]) for n in range(n_span)] for row in cuts]
    spans = torch.zeros(shape, dtype=torch.long)
    for b in range(batch):
        for n, (start, stop) in enumerate(runs[b], start=1):
            spans[b, start:stop] = n
    selected = router.causal_selection(scores, logits, task, keep,
                                       context(valid, length, batch, spans if n_span else None))
    for b in range(batch):
        threshold = 0.3 if task == "t2i" else -0.3
        expected = {i for i in range(length) if valid[b, i] and logits[b, i] > threshold}
        value = scores[b].nan_to_num(-math.inf, math.inf, -math.inf).tolist()
        for start, stop in runs[b] if task == "t2i" else []:
            order = [i for i in golden_order(valid[b].tolist()) if start <= i < stop]
            expected -= set(range(start, stop))
            budget = max(0, count(keep, int(valid[b, :stop].sum())) - len([i for i in expected if i < start]))
            expected |= set(sorted(order, key=lambda i: (-value[i], order.index(i)))[:budget])
        assert selected[b].nonzero().squeeze(1).tolist() == sorted(expected)


def test_span_number():
    """Runs of one id are numbered from the left, whatever the ids; padding inside a span does
    not cut it in two.
    """
    spans = torch.tensor([[0, 7, 7, 0, 3, 3], [2, 1, 1, 0, 1, 0], [5, 5, 5, 5, 5, 5]])
    valid = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 1, 1], [0, 1, 0, 1, 1, 0]]).bool()
    assert span_number(spans, valid).tolist() == [[0, 1, 1, 0, 2, 2], [1, 2, 0, 0, 2, 0], [0, 1, 0, 1, 1, 0]]


def test_causal_router_slots():
    """Rule "causal" makes as many slots as the fullest row has kept tokens, none when nobody is
    kept.
    """
    router, x = TaskRouter(4, 2, ("mmu",)), torch.randn(2, 6, 4)
    logits = router.predictor(x).squeeze(2)
    router.threshold_mmu.copy_(logits.flatten().sort().values[4:6].mean())
    routing = router(x, "mmu", .5, context(None, 6, 2), "causal")
    assert routing.indices.shape[1] == int(routing.selected.sum(1).max()) and int(routing.live.sum()) == 7
    router.threshold_mmu.fill_(1e9)
    assert router(x, "mmu", .5, context(None, 6, 2), "causal").indices.shape == (2, 0)


# ---------------------------------------------------------------- router, gate, predictor

@pytest.mark.parametrize("gate", GATES)
def test_gates_are_one_at_zero(gate):
    """g(0) = 1 to the bit in every dtype, and the slope there is not zero: the router can learn."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        r = torch.zeros(3, dtype=dtype, requires_grad=True)
        g = GATES[gate](r)
        g.sum().backward()
        assert torch.equal(g, torch.ones(3, dtype=dtype)) and (r.grad > 0).all()


def test_gate_formulas():
    """1 + r, 2 sigmoid(r), 1 + 0.2 tanh(r)."""
    for r in (-3.0, -.5, .7, 2.0):
        values = [float(GATES[name](torch.tensor(r))) for name in ("linear", "sigmoid", "tanh")]
        assert values == pytest.approx([1 + r, 2 / (1 + math.exp(-r)), 1 + .2 * math.tanh(r)])


def test_router_starts_at_zero():
    """A fresh router scores 0 everywhere, so that the gate starts at 1; a threshold a task, one
    router.
    """
    router = TaskRouter(4, 2, ("t2i", "mmu"))
    assert not router.score.weight.any() and not router.score.bias.any()
    assert sorted(name for name, _ in router.named_buffers()) == ["threshold_mmu", "threshold_t2i"]


@given(seeds, st.booleans())
def test_predictor_loss_value_and_targets(seed, padded):
    """Mean over valid tokens of the binary cross-entropy against "this row kept this token", row
    by row.
    """
    torch.manual_seed(seed)
    B, T, keep = 3, 7, 0.4
    router, x = TaskRouter(4, 3, ("t2i",)).double(), torch.randn(B, T, 4, dtype=torch.float64)
    torch.nn.init.normal_(router.score.weight)
    valid = random_valid(B, T, seed, empty=False) if padded else None
    routing = router(x, "t2i", keep, context(valid, T, B), "topk")
    terms = []
    for b in range(B):
        ok = [True] * T if valid is None else valid[b].tolist()
        kept = naive_topk(routing.scores[b].float().tolist(), count(keep, sum(ok)), ok)
        for i in range(T):
            p = 1 / (1 + math.exp(-routing.predictor[b, i].item()))
            terms += [-math.log(p if i in kept else 1 - p)] if ok[i] else []
    assert predictor_loss([routing], valid).item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)


@given(seeds, st.sampled_from((0.0, 0.3, 1.0)) | st.floats(0, 1), st.integers(1, 9), st.booleans(), st.booleans())
def test_the_predictors_choice_has_its_own_k_and_the_routers_gate(seed, keep, T, padded, tied):
    """Rule "predicted": the k tokens that the predictor puts first, as many as top-k takes; scores,
    and what predictors learn, stay the router's.
    """
    torch.manual_seed(seed)
    router, x = TaskRouter(4, 3, ("t2i",)).double(), torch.randn(3, T, 4, dtype=torch.float64)
    torch.nn.init.normal_(router.score.weight)
    if tied:
        torch.nn.init.zeros_(router.predictor[2].weight)
    valid = random_valid(3, T, seed, empty=False) if padded else None
    topk, predicted = (router(x, "t2i", keep, context(valid, T, 3), rule) for rule in ("topk", "predicted"))
    assert torch.equal(topk.scores, predicted.scores) and torch.equal(topk.predictor, predicted.predictor)
    assert topk.topk is topk.selected and torch.equal(topk.topk, predicted.topk)
    assert torch.equal(topk.selected.sum(1), predicted.selected.sum(1)) and topk.indices.shape == predicted.indices.shape
    for b in range(3):
        ok = [True] * T if valid is None else valid[b].tolist()
        kept = naive_topk(predicted.predictor[b].float().tolist(), count(keep, sum(ok)), ok)
        assert predicted.selected[b].nonzero().flatten().tolist() == kept
        live = [True] * predicted.indices.shape[1] if predicted.live is None else predicted.live[b]
        assert predicted.indices[b][torch.as_tensor(live, dtype=torch.bool)].tolist() == kept
    assert torch.equal(predictor_loss([topk], valid), predictor_loss([predicted], valid))


@pytest.mark.parametrize("rule", ("topk", "predicted"))
def test_predictor_loss_moves_only_the_predictor(rule):
    """Its gradient is non-zero in the predictor and exactly zero in every other parameter and in
    the input.
    """
    plan = Plan({"t2i": (.5, .5, 1), "mmu": (1, .3, .7)})
    for task in plan.tasks:
        model = build(tiny("emu3"), plan, dtype=torch.float32)
        inputs = call(model.config, 3, 9, 0, padding="left")
        routings = [r for r in model(task=task, routing=rule, **inputs).routing if r is not None]
        assert len(routings) == 2
        predictor_loss(routings, inputs["valid"]).backward()
        for name, weight in model.named_parameters():
            mine = ".predictor." in name and f".{task}." in name
            assert mine == (weight.grad is not None and bool(weight.grad.any())), name


def test_the_router_can_decide_by_itself():
    """membership="router": no predictor; the score is the logit, and the auxiliary loss moves
    router and model.
    """
    plan = Plan({"t2i": (1, .5, .5), "mmu": (1, .3, .7)})
    model = build(tiny("emu3", membership="router"), plan, dtype=torch.float32)
    assert not any("predictor" in name for name, _ in model.named_parameters())
    routing = [r for r in model(**call(model.config, 3, 9, 0)).routing if r is not None]
    assert all(torch.equal(r.predictor, r.scores) for r in routing)
    predictor_loss(routing, None).backward()
    assert model.router(1, "t2i").score.weight.grad.any() and model.blocks[0].mlp.up.weight.grad.any()
    with pytest.raises(ValueError, match="membership must be one of predictor, router, got 'threshold'"):
        tiny("emu3", membership="threshold")


def test_predictor_loss_is_float32():
    """Logits that autocast has made bf16 are summed in float32: the mean over many tokens keeps
    its digits.
    """
    router, x = TaskRouter(8, 4, ("t2i",)), torch.randn(4, 600, 8, generator=torch.Generator().manual_seed(0))
    routing = router(x, "t2i", 0.5, context(None, 600, 4), "topk")
    half = routing._replace(predictor=routing.predictor.bfloat16())
    loss, whole = predictor_loss([half], None), predictor_loss([half._replace(predictor=half.predictor.float())], None)
    assert loss.dtype == torch.float32 and torch.equal(loss, whole)


def test_predictor_loss_of_padding_only():
    """A batch without a valid token has loss 0, not NaN."""
    valid = torch.zeros(1, 3, dtype=torch.bool)
    routing = TaskRouter(4, 2, ("lm",))(torch.ones(1, 3, 4), "lm", .5, context(valid, 3), "topk")
    assert predictor_loss([routing], valid).item() == 0 and not routing.selected.any()


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("fresh", (True, False))
def test_task_loss_reaches_the_router(gate, fresh):
    """The task loss alone gives every router of the task a non-zero gradient: at its first step,
    with all weights zero, as well as later; routers of the other task get none.
    """
    plan = Plan({"t2i": (1, .5, .5), "mmu": (.5, .5, 1)})
    model = build(tiny("showo", gate=gate), plan, dtype=torch.float32)
    if fresh:
        model = model.with_plan(plan)
    inputs = call(model.config, 2, 10, 3)
    model(task="t2i", **inputs).logits.log_softmax(-1)[..., 0].mean().backward()
    for layer, keep in enumerate(plan.keep["t2i"]):
        for task, router in model.routers[layer].items():
            grad = router.score.weight.grad
            assert (grad is not None and bool(grad.any())) == (task == "t2i" and keep < 1), (layer, task)


def test_scores_stay_float32_under_autocast():
    """Under bf16 autocast the router still computes in float32: bf16 scores would tie by the
    dozen.
    """
    router, x = TaskRouter(16, 4, ("t2i",)), torch.randn(1, 50, 16)
    torch.nn.init.normal_(router.score.weight)
    with torch.autocast("cpu", torch.bfloat16):
        routing = router(x, "t2i", .5, context(None, 50), "topk")
    assert routing.scores.dtype == torch.float32
    assert torch.equal(routing.scores, router(x, "t2i", .5, context(None, 50), "topk").scores)


# ---------------------------------------------------------------- gather and add

@given(st.tuples(st.integers(1, 3), st.integers(1, 6)), st.integers(0, 6), seeds, st.booleans())
def test_gather_and_add_against_loops(shape, n_slot, seed, transposed):
    """gather_tokens picks x[b, indices[b, k]] for any trailing shape; add_tokens adds there and
    nowhere else, K = 0 and non-contiguous tensors included; neither writes into its input.
    """
    (B, T), K = shape, min(n_slot, shape[1])
    torch.manual_seed(seed)
    x, update = torch.randn(B, T, 4), torch.randn(B, K, 4)
    wide = torch.randn(B, T, 2, 3)
    if transposed:
        x, wide = torch.randn(T, B, 4).transpose(0, 1), torch.randn(3, T, 2, B).permute(3, 1, 2, 0)
        update = torch.randn(4, K, B).permute(2, 1, 0)
    indices = torch.stack([torch.randperm(T)[:K] for _ in range(B)])
    places = flat(indices, T)
    before, expected = x.clone(), x.clone()
    for b in range(B):
        for k in range(K):
            i = int(indices[b, k])
            assert torch.equal(gather_tokens(x, places)[b, k], x[b, i])
            assert torch.equal(gather_tokens(wide, places)[b, k], wide[b, i])
            expected[b, i] += update[b, k]
    assert gather_tokens(wide, places).shape == (B, K, 2, 3)
    assert torch.equal(add_tokens(x, places, update), expected) and torch.equal(x, before)


def test_a_bf16_router_does_not_tie():
    """Scores of bf16 weights are added up in float32: nearly as many different ones as tokens."""
    router = TaskRouter(64, 0, ["mmu"]).bfloat16()
    torch.nn.init.normal_(router.score.weight)
    x = torch.randn(1, 1000, 64, dtype=torch.bfloat16)
    scores = router(x, "mmu", 0.5, SimpleNamespace(valid=None, order=None, n_future=0), "topk").scores
    assert scores.dtype == torch.float32 and len(scores.unique()) > 990


def test_add_tokens_keeps_the_dtype_of_the_stream():
    """A float32 update of a bf16 stream is added in bf16."""
    x = torch.ones(1, 3, 2, dtype=torch.bfloat16)
    assert add_tokens(x, flat(torch.tensor([[1]]), 2), torch.ones(1, 1, 2)).dtype == torch.bfloat16

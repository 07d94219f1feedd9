"""flops.py: the closed formula against a counter of the real matrix products."""
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from helpers import BACKBONES, N_LAYER, build, call, calls, count, plans, real, tiny
from unimod_mini.cache import Cache
from unimod_mini.config import ModelConfig
from benchmarks.paper_flops import comparisons
from unimod_mini.flops import (PARTS, batch_flops, bisect, count_flops, flops_ratio, live_pairs,
                               main, parser, spread_pairs)
from unimod_mini.flops import activation_bytes, cache_bytes, count_parameters
from unimod_mini.plan import BASELINES, Plan
from unimod_mini.routers import GATES, predictor_loss
from unimod_mini.transformer import UnifiedTransformer, attention_mask

backbones, tasks = st.sampled_from(BACKBONES), st.sampled_from(("t2i", "mmu"))


@st.composite
def configs(draw):
    """Any small model: widths, heads, grouped heads, QK norm, learned positions, and who decides
    membership.
    """
    groups = draw(st.integers(1, 2))
    heads = groups * draw(st.integers(1, 3))
    return tiny(draw(backbones), n_head=heads, n_kv_head=groups, d_model=4 * heads * draw(st.integers(1, 3)),
                d_ff=draw(st.integers(1, 48)), vocab_size=draw(st.integers(21, 40)), qk_norm=draw(st.booleans()),
                image_positions=draw(st.sampled_from((0, 4))), gate=draw(st.sampled_from(tuple(GATES))),
                membership=draw(st.sampled_from(("predictor", "router"))), predictor_width=draw(st.integers(0, 9)))


def eager_attention(q, k, v, attn_mask=None, is_causal=False, **_):
    """Attention by two plain matrix products over the full square, which the counter sees."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril() if is_causal else attn_mask
    return scores.masked_fill(~mask, -math.inf).softmax(-1) @ v


def counted(model, task, inputs, train=False):
    """What the counter of PyTorch sees in one forward, or one forward and backward with the
    predictor's loss.
    """
    with pytest.MonkeyPatch.context() as patch, FlopCounterMode(display=False) as counter:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", eager_attention)
        out = model(task=task, **inputs)
        if train:
            routed = [r for r in out.routing if r is not None]
            (out.logits.square().mean() + (predictor_loss(routed, inputs["valid"]) if routed else 0)).backward()
    return counter.get_total_flops()


@settings(max_examples=40)
@given(configs(), plans(), tasks, st.integers(1, 2), st.integers(1, 17), st.booleans(), st.integers(0, 9))
def test_against_the_counter(config, plan, task, batch, length, spans, seed):
    """The analytic count equals the matrix products that run, forward, and forward and backward,
    for any model and plan (keep 0, keep 1 and keeps that round to no slot included), with a mask or
    without, a row of a batch each.
    """
    inputs = call(config, batch, length, seed, "left" if spans else "none", spans)
    model = build(config, plan, dtype=torch.float32)
    for mode in ("forward", "train"):
        flops = count_flops(config, plan, task, length, mode)
        assert batch * flops.total == counted(model, task, inputs, mode == "train")


def test_counter_sees_the_attention():
    """The twin is not blind: one score product more per token pair is one count more."""
    config, model = tiny("emu3"), build(tiny("emu3"), dtype=torch.float32)
    short, long = (counted(model, "t2i", call(config, 1, n, 0)) for n in (8, 16))
    assert long - 2 * short == N_LAYER * 4 * config.d_model * (16**2 - 2 * 8**2)


def seen_masks(model, task, inputs):
    """The (B, K, K) bool mask of every attention that runs, in order, and the routings."""
    masks = []

    def record(q, k, v, attn_mask=None, is_causal=False, **_):
        causal = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril().expand(len(q), 1, -1, -1)
        masks.append((causal if is_causal else attn_mask)[:, 0])
        return eager_attention(q, k, v, attn_mask, is_causal)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
        return masks, model(task=task, **inputs).routing


@given(st.data(), backbones, plans(), tasks)
def test_live_pairs_are_those_of_the_mask(data, backbone, plan, task):
    """live_pairs counts the True entries of the mask of the gathered tokens: of the masks that
    attention received, rows of padding and of spare slots apart, and of the mask rule applied to
    the routed tokens alone.
    """
    config = tiny(backbone)
    inputs, model = data.draw(calls(config, places="default")), build(config, plan)
    masks, routing = seen_masks(model, task, inputs)
    valid = real(inputs)
    places, spans = (valid.cumsum(1) - 1).clamp(min=0), inputs["spans"]
    for keep, decision in zip(plan.keep[task], routing):
        slots = count(keep, valid.shape[1])
        mask = masks.pop(0) if slots else None
        for b in range(len(valid)):
            kept = (valid if decision is None else decision.selected)[b].nonzero().squeeze(1)
            if not slots:
                assert keep == 0 or len(kept) == 0
                continue
            span = None if spans is None else spans[b]
            pairs = live_pairs(valid.shape[1], span, valid[b], None if decision is None else kept)
            rule = attention_mask(places[b:b + 1, kept], None if span is None else span[None, kept], None)
            used = valid[b] if decision is None else torch.arange(slots) < len(kept)
            assert pairs == rule.sum() == mask[b, used].sum()
    assert not masks


@given(backbones, plans(), tasks, st.integers(1, 400), st.integers(0, 400), st.sampled_from(("forward", "train")))
def test_live_convention(backbone, plan, task, length, span, mode):
    """Only the scores change: 4 D FLOPs for a pair that the mask lets through, three times that in
    training. The full square is an upper bound, plain causal K (K + 1) / 2 the lower one, a span of
    everything is the square itself.
    """
    config, span = tiny(backbone), min(span, length)
    full = count_flops(config, plan, task, length, mode)
    pairs = spread_pairs(plan.keep[task], length, span)
    live = count_flops(config, plan, task, length, mode, pairs)
    passes = 3 if mode == "train" else 1
    assert live.by_part["scores"] == passes * 4 * config.d_model * sum(pairs)
    assert {**full.by_part, "scores": 0} == {**live.by_part, "scores": 0}
    slots = [count(keep, length) for keep in plan.keep[task]]
    assert all(k * (k + 1) // 2 <= n <= k * k for k, n in zip(slots, pairs))
    assert spread_pairs(plan.keep[task], length, 0) == [k * (k + 1) // 2 for k in slots]
    assert count_flops(config, plan, task, length, mode, spread_pairs(plan.keep[task], length, length)) == full


def test_a_dense_layer_has_no_spread():
    """Where every token is kept, spread_pairs is live_pairs, span and all."""
    for length, span in ((12, 5), (7, 7), (9, 0)):
        spans = [0] * (length - span) + [1] * span
        assert spread_pairs((1.0,), length, span) == [live_pairs(length, spans)]


@given(backbones, plans(), tasks, st.integers(1, 3000), st.sampled_from(("forward", "train")))
def test_parts_and_layers_add_up(backbone, plan, task, length, mode):
    """total = sum of the parts = sum of the layers + head, integers all, and both are margins of
    the table by layer and part; keep 0 and the embedding cost nothing; router and predictor cost
    something exactly where a layer routes.
    """
    flops = count_flops(tiny(backbone), plan, task, length, mode)
    assert flops.total == sum(flops.by_part.values()) == sum(flops.by_layer) + flops.by_part["head"]
    assert tuple(flops.by_part) == PARTS and len(flops.by_layer) == len(flops.table) == N_LAYER
    assert [sum(layer.values()) for layer in flops.table] == flops.by_layer
    assert all(sum(layer[part] for layer in flops.table) == flops.by_part[part] for part in PARTS if part != "head")
    assert all(type(n) is int for n in (flops.total, *flops.by_layer, *flops.by_part.values()))
    row = plan.keep[task]
    assert [n == 0 for n in flops.by_layer] == [keep == 0 for keep in row] and flops.by_part["embedding"] == 0
    for layer, keep in zip(flops.table, row):
        assert (layer["router"] > 0) == (layer["predictor"] > 0) == (0 < keep < 1)
        assert (layer["projections"] > 0) == (layer["scores"] > 0) == (layer["mlp"] > 0) == (count(keep, length) > 0)


@given(backbones, st.integers(0, N_LAYER - 1), st.integers(8, 200), st.sampled_from(("forward", "train")))
def test_ratio_grows_with_keep(backbone, layer, length, mode):
    """Keeping more costs more, from keep 0 over the routed ones; no plan is 1 and a skipped
    layer is below it.
    """
    config, ratios = tiny(backbone), []
    for keep in (0, .01, .1, .3, .5, .7, .9):
        row = [1.0] * N_LAYER
        row[layer] = keep
        plan = Plan({"t2i": row, "mmu": (1,) * N_LAYER})
        ratios.append(flops_ratio(config, plan, {"t2i": length, "mmu": 5}, mode))
    assert all(a <= b for a, b in itertools.pairwise(ratios)) and ratios[0] < ratios[2] < ratios[-1]
    assert ratios[0] < flops_ratio(config, Plan.dense(N_LAYER), {"t2i": length, "mmu": 5}, mode) == 1


def test_ratio_is_over_one_sample_of_each_task():
    """flops_ratio adds the tasks' counts before it divides."""
    config, plan = tiny("showo"), Plan({"t2i": (1, .5, 0), "mmu": (1, 1, .2)})
    up = count_flops(config, plan, "t2i", 30, "train").total + count_flops(config, plan, "mmu", 9, "train").total
    down = count_flops(config, None, "t2i", 30, "train").total + count_flops(config, None, "mmu", 9, "train").total
    assert flops_ratio(config, plan, {"t2i": 30, "mmu": 9}) == up / down


@given(plans(), st.integers(1, 40), st.integers(1, 40), st.integers(0, 5), st.integers(1, 5), st.booleans())
def test_ratio_of_a_mixed_batch(plan, n_t2i, n_mmu, count_t2i, count_mmu, live):
    """counts are the samples of each task in a step: the same as counting sample after sample; one
    each is the default; a batch of one task has that task's ratio; spans count live.
    """
    config, lengths, counts = tiny("showo"), {"t2i": n_t2i, "mmu": n_mmu}, {"t2i": count_t2i, "mmu": count_mmu}
    spans = {"t2i": n_t2i // 2, "mmu": n_mmu // 3} if live else None

    def total(plan):
        keep = lambda task: (1.0,) * N_LAYER if plan is None else plan.keep[task]
        return sum(count_flops(config, plan, task, n, "train",
                               spread_pairs(keep(task), n, spans[task]) if live else None).total
                   for task, n in lengths.items() for _ in range(counts[task]))

    assert batch_flops(config, plan, lengths, "train", counts, spans) == total(plan)
    assert flops_ratio(config, plan, lengths, "train", counts, spans) == total(plan) / total(None)
    assert flops_ratio(config, plan, lengths) == flops_ratio(config, plan, lengths, counts={"t2i": 3, "mmu": 3})
    assert (flops_ratio(config, plan, lengths, counts={"t2i": 0, "mmu": 2})
            == flops_ratio(config, plan, {"mmu": n_mmu}))


# memory.py

@given(configs(), plans())
def test_parameters(config, plan):
    """The closed form equals the numbers of a model that was built, dense and with the plan's
    routers.
    """
    assert count_parameters(config) == sum(p.numel() for p in UnifiedTransformer(config).parameters())
    assert count_parameters(config, plan) == sum(p.numel() for p in UnifiedTransformer(config, plan).parameters())


def saved_bytes(model, task, inputs):
    """Bytes of the distinct storages that autograd saves in one forward, parameters apart."""
    own, held = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(tensor):  # holding the tensor keeps its address from being used again
        held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(task=task, **inputs)
    return sum(x.untyped_storage().nbytes() for pointer, x in held.items() if pointer not in own)


@given(configs(), plans(), tasks, st.integers(1, 2), st.integers(1, 17), st.booleans(),
       st.sampled_from(("none", "left", "holes")), st.integers(0, 9))
def test_activation_bytes(config, plan, task, batch, length, spans, padding, seed):
    """The closed form equals, to the byte, what autograd saves in a float32 forward, for any
    model, plan and mask.
    """
    model, inputs = build(config, plan, dtype=torch.float32), call(config, batch, length, seed, padding, spans)
    kept = activation_bytes(config, plan, task, length, spans, padding != "none")
    assert batch * kept.total == saved_bytes(model, task, inputs)
    assert len(kept.by_layer) == N_LAYER and sum(kept.by_layer) < kept.total


@given(configs(), plans(), tasks, st.integers(1, 2), st.integers(1, 17), st.integers(0, 9))
def test_cache_bytes(config, plan, task, batch, length, seed):
    """The closed form at the tokens that were routed equals what the cache says it uses, in float64
    and float32; at the plan's own K it is right for dense and skipped layers, and for a routed one
    within what its predictor decided.
    """
    for dtype, element in ((torch.float64, 8), (torch.float32, 4)):
        model = build(config, plan, dtype=dtype)
        cache = Cache(model, task, batch, length)
        with torch.no_grad():
            model(call(config, batch, length, seed)["ids"], task=task, routing="causal", cache=cache)
        rows = [[0 if layer is None else layer.counts[b] for layer in cache.layers] for b in range(batch)]
        counts = [cache_bytes(config, plan, task, length, element, routed=row) for row in rows]
        assert sum(count.total for count in counts) == cache.nbytes(used=True)
        own = cache_bytes(config, plan, task, length, element)
        assert own.total == sum(own.by_layer)
        for layer, keep in enumerate(plan.keep[task]):
            if keep in (0, 1):
                assert all(count.by_layer[layer] == own.by_layer[layer] for count in counts)


@pytest.mark.parametrize("name, length, tera", [("showo-1.3b", 387, 1.06), ("showo-1.3b", 640, 1.78),
                                                ("showo-1.3b", 1408, 4.13), ("emu3-8b", 1024, 16.4),
                                                ("emu3-8b", 4096, 72.2), ("emu3-8b", 5120, 93.0)])
def test_published_sizes(name, length, tera):
    """The TFLOPs of the true shapes, full square of attention, head included."""
    total = count_flops(ModelConfig.preset(name), None, "t2i", length).total
    assert round(total / 1e12, 2 if tera < 10 else 1) == tera
    if name == "emu3-8b":
        assert total == 2 * 7_735_533_568 * length + 4 * 32 * 4096 * length**2


def test_numpy_lengths_do_not_overflow():
    config = ModelConfig.preset("showo-1.3b")
    assert count_flops(config, None, "t2i", np.int32(1408)) == count_flops(config, None, "t2i", 1408)


@pytest.mark.parametrize("arguments, message", [
    (("t2i", 5, "backward"), 'mode must be "forward" or "train" and length an integer >= 1, got \'backward\', 5'),
    (("t2i", 0), "length an integer >= 1, got 'forward', 0"),
    (("t2i", 2.5), "length an integer >= 1, got 'forward', 2.5"),
    (("lm", 5), r"the plan has tasks \('t2i', 'mmu'\) and 3 layers, asked for 'lm' and 3"),
])
def test_errors(arguments, message):
    """What cannot be counted is a ValueError that says why."""
    with pytest.raises(ValueError, match=message):
        count_flops(tiny("emu3"), Plan.dense(N_LAYER), *arguments)
    for wrong in (Plan.mod(4), Plan({"mmu": (1, 1, 1)})):
        for count in (activation_bytes, cache_bytes):
            with pytest.raises(ValueError, match="the plan has tasks .* layers, asked for 't2i' and 3"):
                count(tiny("emu3"), wrong, "t2i", 9)
    with pytest.raises(ValueError, match="the plan has tasks .* and 4 layers, asked for 't2i' and 3"):
        count_flops(tiny("emu3"), Plan.dense(4), "t2i", 5)
    for counts in ({"t2i": 1}, {"t2i": 1, "mmu": -1}, {"t2i": 0, "mmu": 0}, {"t2i": 1, "mmu": 1, "lm": 1}):
        with pytest.raises(ValueError, match="counts must give every task of lengths a number of samples >= 0"):
            flops_ratio(tiny("emu3"), Plan.dense(N_LAYER), {"t2i": 5, "mmu": 5}, counts=counts)
    with pytest.raises(ValueError, match="one number of pairs a layer, got 2 for 3 layers"):
        count_flops(tiny("emu3"), None, "t2i", 5, pairs=[3, 3])
    with pytest.raises(ValueError, match="a span of 6 tokens does not fit into 5"):
        spread_pairs((1.0,), 5, 6)


# The command line

def test_the_flags_are_frozen():
    """The command line of flops: names and defaults."""
    flags = {a.option_strings[0]: a.default for a in parser()._actions if a.option_strings[0] != "-h"}
    assert flags == {"--preset": None, "--plan": "dense", "--length": None, "--task": "t2i", "--mode": "train",
                     "--span": 0}


@pytest.mark.parametrize("plan", (*BASELINES, "saved"))
@pytest.mark.parametrize("mode", ("forward", "train"))
def test_the_table(plan, mode, tmp_path, capsys):
    """Rows and columns are those of count_flops in GFLOPs, for a method by name and for a saved
    plan.
    """
    config, n = ModelConfig.preset("toy-showo"), 60
    own = BASELINES[plan](config.n_layer, ("mmu",)) if plan in BASELINES else Plan({"mmu": (1, .3, 0, .9, .001, 1, .5, .7)})
    if plan == "saved":
        plan = str(tmp_path / "plan.json")
        own.save(plan)
    arguments = ["--preset", "toy-showo", "--plan", plan, "--length", str(n), "--task", "mmu", "--mode", mode]
    main([*arguments, "--span", "20"])
    lines, flops = capsys.readouterr().out.splitlines(), count_flops(config, own, "mmu", n, mode)
    scale = 1e9 if count_flops(config, None, "mmu", n, mode).total >= 1e9 else 1e6
    assert f"{'G' if scale == 1e9 else 'M'}FLOPs, full n x n attention" in lines[0]
    rows = [[float(x) for x in line.split()] for line in lines[2:2 + config.n_layer]]
    for layer, (row, keep) in enumerate(zip(rows, own.keep["mmu"])):
        assert row[:3] == [layer, round(keep, 3), count(keep, n)]
        expected = [flops.table[layer][part] for part in PARTS[1:-1]] + [flops.by_layer[layer]]
        assert row[3:] == pytest.approx([x / scale for x in expected], abs=1e-4)
    last = {line.split()[0]: float(line.split()[-1]) for line in lines[2 + config.n_layer:5 + config.n_layer]}
    assert last == pytest.approx({"embedding": 0, "head": flops.by_part["head"] / scale, "total": flops.total / scale},
                                 abs=1e-4)
    text = "\n".join(lines)
    live = count_flops(config, own, "mmu", n, mode, spread_pairs(own.keep["mmu"], n, 20)).total
    assert f"total {live / scale:.4f}" in text and f"parameters: {count_parameters(config, own):,}" in text
    main(arguments)
    for out, spans in ((text, True), (capsys.readouterr().out, False)):
        kept = [activation_bytes(config, which, "mmu", n, spans).total / 1e6 for which in (own, None)]
        cache = [cache_bytes(config, which, "mmu", n).total / 1e6 for which in (own, None)]
        assert "backward pass, float32: {:,.3f} MB (dense {:,.3f})".format(*kept) in out
        assert "cache, float32: {:,.3f} MB (dense {:,.3f})".format(*cache) in out


def test_the_comparison():
    """benchmarks/paper_flops.py, at the true sizes: a forward pass of one GPU's batch of 12 x 1,408
    tokens comes within 5 % of the paper's 51.1, one of an image and 950 ids of text of its 89.0; no
    training step does; the plans meet the ratios.
    """
    showo, emu3 = (text.splitlines() for text in comparisons().split("\n\n")[:2])
    assert showo[2].split()[-4:] == ["49.5*", "48.2", "148.6", "144.7"]
    assert emu3[3].split()[-4:] == ["93.0*", "86.1*", "278.9", "258.3"]
    assert sum(line.count("*") for line in (*showo[2:], *emu3[2:])) == 3
    for lines, ratio in ((showo, 0.847), (emu3, 0.601)):
        values = [float(x) for x in lines[-1].split()[-4:]]
        assert values[2] == ratio and all(abs(x - ratio) < 0.01 for x in values)


@given(st.floats(-3, 3), st.floats(0.1, 5))
def test_bisect(target, slope):
    """bisect finds where an ascending cost meets the target, or the end that comes nearest."""
    x = bisect(lambda x: slope * x, target, -1.0, 1.0)
    assert abs(x - min(1.0, max(-1.0, target / slope))) < 1e-9


@pytest.mark.parametrize("arguments, message", [
    (["--preset", "showo"], "unknown 'showo', the presets are toy-showo"),
    (["--length", "0"], "length an integer >= 1"),
    (["--plan", "missing.json"], "missing.json: No such file or directory; --plan takes a file or one of mod, interleaved"),
    (["--plan", "."], "Is a directory"),
    (["--plan", "foreign.json"], "foreign.json is not a plan"),
    (["--plan", "shallow.json"], "4 layers, asked for 't2i' and 8"),
    (["--span", "10"], "a span of 10 tokens does not fit into 9"),
    (["--span", "-1"], "a span of -1 tokens does not fit into 9"),
])
def test_errors_in_one_line(arguments, message, tmp_path, monkeypatch):
    """What cannot be counted ends the program with one line that says why."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "foreign.json").write_text("[]")
    Plan.dense(4).save("shallow.json")
    with pytest.raises(SystemExit, match=f"^error: .*{message}") as caught:
        main(["--preset", "toy-emu3", "--length", "9", *arguments])
    assert "\n" not in str(caught.value)

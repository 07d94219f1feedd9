"""flops.py: the closed formula against a counter of the real matrix products."""
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from helpers import BACKBONES, N_LAYER, build, call, count, plans, tiny
from unimod_mini.flops import PARTS, count_flops, flops_ratio
from unimod_mini.routers import Plan, predictor_loss
from unimod_mini.transformer import ModelConfig

backbones, tasks = st.sampled_from(BACKBONES), st.sampled_from(("t2i", "mmu"))


def eager_attention(q, k, v, attn_mask=None, is_causal=False, **_):
    """Attention by two plain matrix products over the full square, which the counter sees."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril() if is_causal else attn_mask
    return scores.masked_fill(~mask, -math.inf).softmax(-1) @ v


def counted(model, task, inputs, train=False):
    """What the counter of PyTorch sees in one forward, or one forward and backward with the predictor's loss."""
    with pytest.MonkeyPatch.context() as patch, FlopCounterMode(display=False) as counter:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", eager_attention)
        out = model(task=task, **inputs)
        if train:
            losses = [predictor_loss(r, inputs["valid"]) for r in out.routing if r is not None]
            (out.logits.square().mean() + sum(losses)).backward()
    return counter.get_total_flops()


@settings(max_examples=30)
@given(backbones, plans(), tasks, st.integers(1, 17), st.booleans(), st.sampled_from((0, 5)),
       st.sampled_from(("predictor", "router")), st.integers(0, 9))
def test_forward_against_the_counter(backbone, plan, task, length, spans, predictor_width, membership, seed):
    """The analytic forward count equals the matrix products that run, for any plan, keep 0 and 1 included, in both
    backbones, with grouped heads, with a mask or without, with a predictor or without."""
    config = tiny(backbone, predictor_width=predictor_width, membership=membership)
    inputs = call(config, 1, length, seed, "left" if spans else "none", spans)
    model = build(config, plan, dtype=torch.float32)
    assert count_flops(config, plan, task, length).total == counted(model, task, inputs)


@settings(max_examples=30)
@given(backbones, plans(), tasks, st.integers(2, 17))
def test_training_against_the_counter(backbone, plan, task, length):
    """The same for forward and backward, where every routed layer has a slot (else autograd skips its router)."""
    config = tiny(backbone)
    if any(keep and not count(keep, length) for keep in plan.keep[task]):
        plan = Plan({name: [k if count(k, length) else 0 for k in row] for name, row in plan.keep.items()})
    model = build(config, plan, dtype=torch.float32)
    assert count_flops(config, plan, task, length, "train").total == counted(model, task, call(config, 1, length, 0), True)


def test_counter_sees_the_attention():
    """The twin is not blind: one score product more per token pair is one count more."""
    config, model = tiny("emu3"), build(tiny("emu3"), dtype=torch.float32)
    short, long = (counted(model, "t2i", call(config, 1, n, 0)) for n in (8, 16))
    assert long - 2 * short == N_LAYER * 4 * config.d_model * (16**2 - 2 * 8**2)


@given(backbones, plans(), tasks, st.integers(1, 3000), st.sampled_from(("forward", "train")))
def test_parts_and_layers_add_up(backbone, plan, task, length, mode):
    """total = sum of the parts = sum of the layers + head, integers all; keep 0 costs nothing; router and predictor
    cost something exactly where a layer routes."""
    flops = count_flops(tiny(backbone), plan, task, length, mode)
    assert flops.total == sum(flops.by_part.values()) == sum(flops.by_layer) + flops.by_part["head"]
    assert tuple(flops.by_part) == PARTS and len(flops.by_layer) == N_LAYER
    assert all(type(n) is int for n in (flops.total, *flops.by_layer, *flops.by_part.values()))
    row = plan.keep[task]
    assert [n == 0 for n in flops.by_layer] == [keep == 0 for keep in row]
    routes = any(0 < keep < 1 for keep in row)
    assert (flops.by_part["router"] > 0) == (flops.by_part["predictor"] > 0) == routes


@given(backbones, st.integers(0, N_LAYER - 1), st.integers(8, 200), st.sampled_from(("forward", "train")))
def test_ratio_grows_with_keep(backbone, layer, length, mode):
    """Keeping more costs more, from keep 0 over the routed ones; no plan is 1 and a skipped layer is below it."""
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


@pytest.mark.parametrize("name, length, tera", [("showo-1.3b", 387, 1.06), ("showo-1.3b", 640, 1.78),
                                                ("showo-1.3b", 1408, 4.13), ("emu3-8b", 1024, 16.4),
                                                ("emu3-8b", 4096, 72.2), ("emu3-8b", 5120, 93.0)])
def test_published_sizes(name, length, tera):
    """The TFLOPs of the true shapes, full square of attention, head included."""
    total = count_flops(ModelConfig.preset(name), None, "t2i", length).total
    assert round(total / 1e12, 2 if tera < 10 else 1) == tera
    if name == "emu3-8b":
        assert total == 2 * 7_735_533_568 * length + 4 * 32 * 4096 * length**2


@pytest.mark.parametrize("arguments, message", [
    (("t2i", 5, "backward"), 'mode must be "forward" or "train" and length >= 1, got \'backward\', 5'),
    (("t2i", 0), "length >= 1, got 'forward', 0"),
    (("lm", 5), r"the plan has tasks \('t2i', 'mmu'\) and 3 layers, asked for 'lm' and 3"),
])
def test_errors(arguments, message):
    """What cannot be counted is a ValueError that says why."""
    with pytest.raises(ValueError, match=message):
        count_flops(tiny("emu3"), Plan.dense(N_LAYER), *arguments)
    with pytest.raises(ValueError, match="the plan has tasks .* and 4 layers, asked for 't2i' and 3"):
        count_flops(tiny("emu3"), Plan.dense(4), "t2i", 5)

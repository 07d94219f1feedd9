"""transformer.py: masks, positions, the routed forward against its dense masked twin, causality,
cache, errors.
"""
import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import (BACKBONES, N_LAYER, build, call, calls, count, naive_forward, naive_norm, naive_sees, naive_topk,
                     plans, real, seeds, tiny)
from unimod_mini import transformer
from unimod_mini.cache import Cache
from unimod_mini.config import ModelConfig
from unimod_mini.plan import TASKS, Plan
from unimod_mini.routers import GATES
from unimod_mini.inference import evaluating
from unimod_mini.transformer import UnifiedTransformer, attention_mask, rotary

backbones, tasks = st.sampled_from(BACKBONES), st.sampled_from(("t2i", "mmu"))
ALMOST = 1 - 1e-9                                          # routed, and K = T
near = dict(rtol=1e-9, atol=1e-9)


def routed(*row, shared=False):
    """A plan with the same row for both tasks."""
    return Plan({"t2i": row, "mmu": row}, shared)


def membership(out):
    """selected (B, T) of every layer, None where it is dense or skipped."""
    return [None if routing is None else routing.selected for routing in out.routing]


def layout(config, task, batch, length, seed, padding="none"):
    """A call with spans in the published places of Show-o: mmu at the front, t2i at the end.

    emu3: no spans.
    """
    inputs = call(config, batch, length, seed, padding)
    if config.backbone == "showo":
        number, ok = real(inputs).cumsum(1), real(inputs)
        size = ok.sum(1, keepdim=True)
        inputs["spans"] = (ok & ((number <= size // 2) if task == "mmu" else (number > size // 2))).long()
    return inputs


# ---------------------------------------------------------------- sizes and configs

@pytest.mark.parametrize("name, total", [("showo-1.3b", 1_448_176_770), ("emu3-8b", 8_492_011_520)])
def test_parameter_totals(name, total):
    """The true shapes have the published number of parameters to the last one, routers apart."""
    config = ModelConfig.preset(name)
    with torch.device("meta"):
        dense = UnifiedTransformer(config)
        pruned = UnifiedTransformer(config, Plan.mod(config.n_layer))
    assert sum(p.numel() for p in dense.parameters()) == total
    own = [p.numel() for name, p in pruned.named_parameters() if not name.startswith("routers.")]
    D, h = config.d_model, config.predictor_hidden
    extra = sum(p.numel() for p in pruned.parameters()) - total
    assert sum(own) == total and extra == config.n_layer // 2 * (D + 1 + D * h + h + h + 1)


@pytest.mark.parametrize("changes, message", [
    (dict(backbone="phi"), "backbone must be one of showo, emu3, got 'phi'"),
    (dict(gate="relu"), "gate must be one of linear, sigmoid, tanh, got 'relu'"),
    (dict(membership="me"), "membership must be one of predictor, router, got 'me'"),
    (dict(n_head=5), "n_head=5 must divide d_model=32"),
    (dict(n_kv_head=3), "be a multiple of n_kv_head=3"),
    (dict(rope_fraction=0.4), "rotate an even number of dims a head, not 3"),
    (dict(rope_fraction=1.5), r"rope_fraction=1.5 must lie in \[0, 1\]"),
    (dict(n_head=0), "n_head must be a whole number of at least 1, got 0"),
    (dict(d_ff=0), "d_ff must be a whole number of at least 1"),
])
def test_config_rejects(changes, message):
    """A config that cannot be built is a ValueError that names the field."""
    with pytest.raises(ValueError, match=message):
        replace(tiny("showo"), **changes)


def test_presets_by_name():
    """Four presets; a misspelt name lists them."""
    assert [ModelConfig.preset(f"toy-{b}").backbone for b in BACKBONES] == list(BACKBONES)
    with pytest.raises(ValueError, match="unknown 'toy', the presets are toy-showo, toy-emu3, showo-1.3b, emu3-8b"):
        ModelConfig.preset("toy")


@pytest.mark.parametrize("backbone", BACKBONES)
@given(plan=plans())
def test_routers_exist_where_the_plan_needs_them(backbone, plan):
    """One router for each layer and task with 0 < keep < 1, or one a layer when shared, that all
    tasks use.
    """
    model = UnifiedTransformer(tiny(backbone), plan)
    for layer in range(N_LAYER):
        needed = plan.routed(layer)
        assert list(model.routers[layer]) == (["shared"] if plan.shared_router and needed else needed)
        assert len({id(model.router(layer, task)) for task in needed}) == (len(needed) if not plan.shared_router
                                                                           else min(len(needed), 1))
        for name, router in model.routers[layer].items():
            names = needed if name == "shared" else [name]
            assert {f"threshold_{task}" for task in names} == {key for key, _ in router.named_buffers()}


def test_dense_model_knows_all_tasks():
    """Without a plan there is no router and every task runs, all alike."""
    model = build(tiny("emu3"))
    ids = call(model.config, 2, 5, 0)["ids"]
    outs = [model(ids, task=task) for task in TASKS]
    assert len(list(model.routers.parameters())) == 0 and all(out.routing == [None] * N_LAYER for out in outs)
    assert torch.equal(outs[0].logits, outs[1].logits) and torch.equal(outs[0].logits, outs[2].logits)


# ---------------------------------------------------------------- masks and positions

@given(calls(tiny("emu3")))
def test_attention_mask_against_a_loop(inputs):
    """pos_j <= pos_i or the same span, j valid; every token sees itself."""
    B, T = inputs["ids"].shape
    positions = torch.arange(T).expand(B, T) if inputs["positions"] is None else inputs["positions"]
    mask = attention_mask(positions, inputs["spans"], inputs["valid"])
    assert mask.shape == (B, 1, T, T) and mask.dtype == torch.bool
    for b in range(B):
        spans = None if inputs["spans"] is None else inputs["spans"][b]
        expected = [[naive_sees(i, j, positions[b], spans, real(inputs)[b]) for j in range(T)] for i in range(T)]
        assert mask[b, 0].tolist() == expected


def test_rotary_angles():
    """cos and sin of position x theta^(-2 i / dims), also at the last position of the largest
    model.
    """
    rope = rotary(torch.tensor([[0, 3, 700]]), 6, 1e4)
    assert rope.shape == (1, 3, 2, 6)
    for t, position in enumerate((0, 3, 700)):
        for i in range(3):
            angle = position * 1e4 ** (-2 * i / 6)
            for column, sign in ((i, -1), (i + 3, 1)):
                expected = [math.cos(angle), sign * math.sin(angle)]
                assert rope[0, t, :, column].tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_only_differences_of_positions_count(backbone):
    """Shifted by a thousand, a float64 model gives the same logits to its own precision."""
    model = build(tiny(backbone), Plan.mod(N_LAYER))
    ids, positions = torch.arange(9)[None], torch.arange(9)[None]
    near, far = (model(ids, task="t2i", positions=positions + shift).logits for shift in (0, 1000))
    assert (near - far).abs().max() < 1e-11


def test_evaluating_puts_every_module_back():
    """Inside, nothing is in training mode; afterwards a module that was set apart still is."""
    model = build(tiny("emu3")).train()
    model.blocks[0].eval()
    before = [module.training for module in model.modules()]
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before and len(set(before)) == 2


@pytest.mark.parametrize("backbone", BACKBONES)
def test_rotary_depends_on_differences(backbone):
    """Moving all positions by the same number changes nothing; moving one of them does."""
    model = build(tiny(backbone), routed(1, .5, 1))
    ids = call(model.config, 2, 8, 0)["ids"]
    positions = torch.arange(8).expand(2, 8)
    logits = model(ids, positions=positions).logits
    torch.testing.assert_close(model(ids, positions=positions + 40).logits, logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(model(ids, positions=positions + (positions > 3)).logits, logits, rtol=.01, atol=.01)


@given(backbones, plans(), tasks, st.integers(1, 8), st.integers(1, 5), seeds, st.sampled_from(("topk", "causal")))
def test_default_positions_ignore_left_padding(backbone, plan, task, length, pads, seed, rule):
    """Padding on the left, whatever ids it holds, changes no logit of the real tokens."""
    model = build(tiny(backbone), plan)
    short = layout(model.config, task, 2, length, seed)
    garbage = call(model.config, 2, pads, seed + 1)["ids"]
    long = dict(ids=torch.cat((garbage, short["ids"]), 1), valid=(torch.arange(pads + length) >= pads).expand(2, -1),
                spans=None if short["spans"] is None else torch.cat((garbage * 0, short["spans"]), 1))
    logits = model(task=task, routing=rule, **long).logits[:, pads:]
    torch.testing.assert_close(logits, model(task=task, routing=rule, **short).logits, **near)


@given(backbones, plans(), tasks, st.integers(1, 9), seeds, st.sampled_from(("topk", "causal")))
def test_causal_fast_path_equals_the_masked_path(backbone, plan, task, length, seed, rule):
    """No mask, a mask from `valid`, from explicit positions or from empty spans: the same logits
    and selection.
    """
    model = build(tiny(backbone), plan)
    ids = call(model.config, 2, length, seed)["ids"]
    plain, positions = model(ids, task=task, routing=rule), torch.arange(length).expand(2, length)
    others = [dict(positions=positions), dict(valid=torch.ones_like(ids, dtype=torch.bool))]
    if rule == "topk" or task == "mmu":  # t2i's causal rule asks where the image is
        others.append(dict(spans=torch.zeros_like(ids)))
    for other in others:
        out = model(ids, task=task, routing=rule, **other)
        torch.testing.assert_close(out.logits, plain.logits, **near)
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(membership(out), membership(plain)))


# ---------------------------------------------------------------- the routed forward and its twin

@pytest.mark.parametrize("backbone", BACKBONES)
@given(plan=plans(), task=tasks, gate=st.sampled_from(list(GATES)), rule=st.sampled_from(("topk", "causal")),
       qk_norm=st.booleans(), data=st.data())
def test_dense_masked_twin(backbone, plan, task, gate, rule, qk_norm, data):
    """The routed forward and all its gradients equal a full-length computation in which unselected
    tokens are no keys and their update is zero: gathering keeps every token's own position and
    span. Top-k takes the right tokens.
    """
    model = build(tiny(backbone, gate=gate, qk_norm=qk_norm), plan)
    inputs = data.draw(calls(model.config))
    out, ok = model(task=task, routing=rule, **inputs), real(inputs)
    logits, scores = naive_forward(model, task, inputs, membership(out))
    torch.testing.assert_close(out.logits[ok], logits[ok], **near)
    decisions = [routing for routing in out.routing if routing is not None]
    assert len(decisions) == len(scores) == sum(0 < keep < 1 for keep in plan.keep[task])
    for routing, r in zip(decisions, scores):
        torch.testing.assert_close(routing.scores[ok], r[ok], **near)
    for keep, routing in zip((keep for keep in plan.keep[task] if 0 < keep < 1), decisions):
        for b in range(len(ok) if rule == "topk" else 0):
            kept = naive_topk(routing.scores[b].float().tolist(), count(keep, int(ok[b].sum())), ok[b].tolist())
            assert routing.selected[b].nonzero().squeeze(1).tolist() == kept

    probe = torch.randn(logits.shape, dtype=logits.dtype, generator=torch.Generator().manual_seed(0)) * ok[..., None]
    names, weights = zip(*model.named_parameters())
    fast = torch.autograd.grad((out.logits * probe).sum(), weights, allow_unused=True)
    slow = torch.autograd.grad((logits * probe).sum(), weights, allow_unused=True)
    for name, weight, a, b in zip(names, weights, fast, slow):
        a, b = (torch.zeros_like(weight) if g is None else g for g in (a, b))
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8, msg=lambda text: f"{name}: {text}")


@given(plans(), tasks, st.data())
def test_twin_with_image_positions(plan, task, data):
    """The n-th image token of a row also gets learned position n, counted from the left, around
    and around.
    """
    model = build(tiny("showo", image_positions=3), plan)
    inputs = data.draw(calls(model.config, padding="none"))
    out = model(task=task, **inputs)
    torch.testing.assert_close(out.logits, naive_forward(model, task, inputs, membership(out))[0], **near)


def test_image_positions_skip_padding():
    """Padding that happens to hold an image id does not move the image: ids under padding never
    matter.
    """
    model = build(tiny("emu3", image_positions=5))
    ids, pad = torch.tensor([[3, 20, 21, 22]]), torch.tensor([[25, 25]])
    valid = torch.tensor([[False] * 2 + [True] * 4])
    logits = model(torch.cat((pad, ids), 1), valid=valid).logits[:, 2:]
    torch.testing.assert_close(logits, model(ids).logits, **near)


@pytest.mark.parametrize("backbone", BACKBONES)
@given(plan=plans(), task=tasks, rule=st.sampled_from(("topk", "causal")), batch=st.integers(1, 3),
       length=st.integers(1, 10), seed=seeds, padding=st.sampled_from(("left", "right", "both", "holes")),
       spans=st.booleans())
def test_row_alone(backbone, plan, task, rule, batch, length, seed, padding, spans):
    """A row of a padded batch of mixed lengths has the logits and the selection that it has
    alone, unpadded.
    """
    model = build(tiny(backbone), plan)
    inputs = call(model.config, batch, length, seed, padding, spans)
    out = model(task=task, routing=rule, **inputs)
    for b, ok in enumerate(inputs["valid"]):
        alone = {name: tensor[b][ok][None] for name, tensor in inputs.items() if name in ("ids", "spans")
                 and tensor is not None}
        one = model(task=task, routing=rule, **alone)
        torch.testing.assert_close(out.logits[b][ok], one.logits[0], **near)
        for many, single in zip(out.routing, one.routing):
            assert many is single is None or torch.equal(many.selected[b][ok], single.selected[0])
            assert many is None or not many.selected[b][~ok].any()


def test_padding_only_row():
    """A row without a valid token keeps nothing, breaks nothing and leaves the other rows alone."""
    model = build(tiny("showo"), routed(.5, 1, .5))
    ids = call(model.config, 2, 6, 0)["ids"]
    valid = torch.tensor([[False] * 6, [True] * 6])
    out = model(ids, valid=valid)
    assert out.logits.isfinite().all() and not out.routing[0].selected[0].any()
    torch.testing.assert_close(out.logits[1:], model(ids[1:]).logits, **near)


# ---------------------------------------------------------------- identities

@pytest.mark.parametrize("backbone", BACKBONES)
@given(plan=plans(), task=tasks, rule=st.sampled_from(("topk", "causal")), data=st.data())
def test_zero_block_is_the_identity(backbone, plan, task, rule, data):
    """With zero output weights every block, dense or routed, leaves every token as it was, to the
    bit: the residual is counted once and never gated, for selected and for skipped tokens.
    """
    model = build(tiny(backbone), plan)
    for name, weight in model.named_parameters():
        if ".out." in name or ".down." in name:
            torch.nn.init.zeros_(weight)
    inputs = data.draw(calls(model.config))
    embedded = model.embed.weight[inputs["ids"]]
    logits = naive_norm(model.norm, embedded) @ model.head.weight.T
    logits = logits + (0 if model.head.bias is None else model.head.bias)
    torch.testing.assert_close(model(task=task, routing=rule, **inputs).logits, logits, **near)
    context = model.context(inputs["ids"], inputs["positions"], inputs["spans"], inputs["valid"])
    for layer in range(N_LAYER):
        assert torch.equal(model.layer(layer, embedded, task, context, rule)[0], embedded)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
@given(gate=st.sampled_from(list(GATES)), data=st.data(), keep=st.sampled_from((ALMOST, .98)), shared=st.booleans())
def test_fresh_gates_are_the_dense_parent_to_the_bit(backbone, dtype, gate, data, keep, shared):
    """K = T with fresh routers, through the routed path, equals the dense parent bit for bit:
    logits and gradients.
    """
    parent = build(tiny(backbone, gate=gate), dtype=dtype)
    inputs = data.draw(calls(parent.config, padding="none"))
    child = parent.with_plan(routed(keep, 1, keep, shared=shared))
    one, two = parent(**inputs), child(**inputs)
    assert two.routing[0].indices.shape == inputs["ids"].shape and two.routing[1] is None
    assert torch.equal(one.logits, two.logits)
    for out in (one, two):
        out.logits.float().square().mean().backward()
    gradients = dict(child.named_parameters())
    for name, weight in parent.named_parameters():
        assert torch.equal(weight.grad, gradients[name].grad), name


@given(backbones, st.sampled_from(("left", "right", "both")), st.booleans(), st.integers(1, 10), seeds)
def test_fresh_gates_with_padding(backbone, padding, spans, length, seed):
    """With padding too, K = T and fresh routers give the dense parent's logits, up to rounding."""
    parent = build(tiny(backbone))
    inputs = call(parent.config, 3, length, seed, padding, spans)
    child, ok = parent.with_plan(routed(ALMOST, ALMOST, 1)), inputs["valid"]
    torch.testing.assert_close(child(**inputs).logits[ok], parent(**inputs).logits[ok], **near)


@pytest.mark.parametrize("training", (False, True))
def test_with_plan_keeps_the_mode(training):
    """A copy of an evaluated model is one: its dropout is off."""
    parent = UnifiedTransformer(tiny("emu3", attention_dropout=0.5)).train(training)
    assert {module.training for module in parent.with_plan(routed(.5, .5, 1)).modules()} == {training}


def test_with_plan_copies_the_weights():
    """The copy owns its weights, equal to the bit and in the same dtype; routers are fresh;
    changes reach the config.
    """
    parent = build(tiny("showo"), routed(.5, .5, 1), dtype=torch.bfloat16)
    child = parent.with_plan(routed(1, .5, 0), gate="linear")
    theirs = dict(child.named_parameters())
    for name, weight in parent.named_parameters():
        if not name.startswith("routers."):
            assert torch.equal(weight, theirs[name]) and weight.data_ptr() != theirs[name].data_ptr()
    assert child.config == replace(parent.config, gate="linear") and child.plan == routed(1, .5, 0)
    assert all(weight.dtype == torch.bfloat16 for weight in child.parameters())
    assert not child.router(1, "t2i").score.weight.any()


@pytest.mark.parametrize("changes", ({"qk_norm": False}, {"d_ff": 8}))
def test_with_plan_names_the_weights_that_do_not_fit(changes):
    """A change of size is an error with the names of the weights."""
    with pytest.raises(RuntimeError, match="blocks.0"):
        build(tiny("showo"), routed(1, .5, 1)).with_plan(routed(1, .5, 1), **changes)


@given(plans(), tasks, st.integers(1, 12), seeds, backbones)
def test_static_slots(plan, task, length, seed, backbone):
    """Under top-k the number of slots depends on keep and length alone; a dense or skipped layer
    has no routing.
    """
    model = build(tiny(backbone), plan, dtype=torch.float32)
    for padding in ("none", "left", "holes"):
        out = model(task=task, **call(model.config, 2, length, seed, padding))
        assert out.logits.shape == (2, length, model.config.vocab_size) and len(out.routing) == N_LAYER
        for keep, routing in zip(plan.keep[task], out.routing):
            assert (routing is None) == (keep in (0, 1))
            if routing is not None:
                assert routing.indices.shape == (2, count(keep, length)) and (routing.live is None) == (padding == "none")
                assert routing.scores.shape == routing.predictor.shape == routing.selected.shape == (2, length)


def test_layers_that_keep_nothing():
    """keep 0, and a keep that rounds to no slot, leave the stream alone; the second still has a
    routing.
    """
    model = build(tiny("emu3"), Plan({"t2i": (0, .04, 0), "mmu": (1, 1, 1)}))
    inputs = call(model.config, 2, 12, 0)
    out = model(task="t2i", **inputs)
    x = model.embed.weight[inputs["ids"]]
    torch.testing.assert_close(out.logits, naive_norm(model.norm, x) @ model.head.weight.T, **near)
    assert out.routing[0] is None and out.routing[1].indices.shape == (2, 0)


def test_attention_dropout_only_in_training():
    """attention_dropout makes training forwards differ and leaves evaluation alone."""
    model = build(tiny("emu3", attention_dropout=.5), routed(1, .5, 1))
    inputs = call(model.config, 1, 8, 0)
    assert torch.equal(model(**inputs).logits, model(**inputs).logits)
    model.train()
    assert not torch.equal(model(**inputs).logits, model(**inputs).logits)


# ---------------------------------------------------------------- causality

def ends(inputs):
    """(B, T): end(i), the last token of i's span, else i."""
    B, T = inputs["ids"].shape
    end = torch.arange(T).repeat(B, 1)
    for b in range(B if inputs["spans"] is not None else 0):
        for i in range(T):
            if inputs["spans"][b, i]:
                end[b, i] = max(j for j in range(T) if inputs["spans"][b, j] == inputs["spans"][b, i])
    return end


@torch.no_grad()
def leak(model, task, inputs, cut, rule):
    """Largest change of a logit at tokens with end(i) <= cut when every token after `cut` is
    replaced.
    """
    ids = inputs["ids"].clone()
    ids[:, cut + 1:] = (ids[:, cut + 1:] + 7) % model.config.vocab_size
    before, after = (model(task=task, routing=rule, **inputs | {"ids": new}) for new in (inputs["ids"], ids))
    early = real(inputs) & (ends(inputs) <= cut)
    for a, b in zip(membership(before), membership(after)):
        if a is not None and rule == "causal":
            assert torch.equal(a[early], b[early])
    change = (before.logits - after.logits).abs()[early]
    return change.max().item() if change.numel() else 0.0


@pytest.mark.parametrize("task", ("t2i", "mmu"))
@pytest.mark.parametrize("backbone", BACKBONES)
@given(plan=plans(), length=st.integers(1, 12), seed=seeds, padding=st.sampled_from(("none", "left", "right")),
       data=st.data())
def test_causal_rule_looks_at_no_later_token(backbone, task, plan, length, seed, padding, data):
    """routing="causal": tokens after end(i) change neither a logit nor a membership at i, in the
    published layouts.
    """
    model = build(tiny(backbone), plan)
    inputs = layout(model.config, task, 2, length, seed, padding)
    assert leak(model, task, inputs, data.draw(st.integers(0, length - 1)), "causal") < 1e-9


@pytest.mark.parametrize("task", ("t2i", "mmu"))
@settings(max_examples=60)
@given(backbone=backbones, plan=plans(), data=st.data())
def test_causal_rule_with_spans_anywhere(task, backbone, plan, data):
    """The same with up to two spans anywhere: text after an image, or a second image, does not
    reach the first.
    """
    model = build(tiny(backbone), plan)
    inputs = data.draw(calls(model.config, places="default", spans=True, length=st.integers(2, 12)))
    assert leak(model, task, inputs, data.draw(st.integers(0, inputs["ids"].shape[1] - 1)), "causal") < 1e-9


def test_text_after_an_image_takes_none_of_its_capacity():
    """t2i: who is kept inside the span depends on the prompt before it, not on the text behind
    it.
    """
    model = build(tiny("showo"), routed(.5, .5, .5))
    ids, spans = torch.arange(10)[None] + 10, torch.tensor([[0, 0, 1, 1, 1, 1, 0, 0, 0, 0]])
    others = [torch.cat((ids[:, :6], torch.full((1, 4), other)), 1) for other in range(10)]
    first, *rest = [model(other, task="t2i", spans=spans, routing="causal") for other in others]
    for out in rest:
        torch.testing.assert_close(out.logits[:, :6], first.logits[:, :6], **near)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_topk_is_not_causal(backbone):
    """Top-k over a sequence looks at the future: a later token changes an earlier logit.

    A dense model's does not.
    """
    inputs = layout(tiny(backbone), "mmu", 4, 12, 0)
    assert leak(build(tiny(backbone), routed(1, .5, .5)), "mmu", inputs, 8, "topk") > 1e-3
    assert leak(build(tiny(backbone)), "mmu", inputs, 8, "topk") < 1e-9


# ---------------------------------------------------------------- the cache

@torch.no_grad()
def decode(model, task, inputs, cuts, explicit=True):
    """Feed the tokens in chunks that end at `cuts` through one cache: logits (B, T, V),
    membership of each layer.
    """
    (B, T), outs = inputs["ids"].shape, []
    cache = Cache(model, task, B, T)
    for start, stop in zip([0, *cuts], [*cuts, T]):
        chunk = {name: inputs[name][:, start:stop] for name in ("ids", "spans") if inputs[name] is not None}
        if inputs["valid"] is not None and (explicit or not inputs["valid"][:, start:stop].all()):
            chunk["valid"] = inputs["valid"][:, start:stop]
        outs.append(model(task=task, routing="causal", cache=cache, **chunk))
    chosen = [None if layer[0] is None else torch.cat(layer, 1) for layer in zip(*map(membership, outs))]
    return torch.cat([out.logits for out in outs], 1), chosen


def test_cache_positions_without_valid():
    """After a left-padded prefill, default positions go on counting valid tokens when `valid` is
    left out.
    """
    model = build(tiny("emu3"), routed(1, .5, 1))
    inputs = call(model.config, 2, 8, 5, "left") | {"valid": torch.arange(8) >= torch.tensor([[3], [1]])}
    logits, _ = decode(model, "mmu", inputs, range(5, 8), explicit=False)
    full = model(task="mmu", routing="causal", **inputs).logits
    torch.testing.assert_close(logits[inputs["valid"]], full[inputs["valid"]], **near)


def test_cache_counts_image_positions():
    """Learned image positions go on from chunk to chunk."""
    model = build(tiny("emu3", image_positions=4))
    inputs = call(model.config, 1, 6, 0) | {"ids": torch.tensor([[1, 21, 22, 23, 24, 2]])}
    logits, _ = decode(model, "t2i", inputs, range(1, 6))
    torch.testing.assert_close(logits, model(task="t2i", routing="causal", **inputs).logits, **near)


# ---------------------------------------------------------------- one graph

# every block kind of the paper, and keep 0
KINDS = {"t2i": (1, .5, 1, .5, 0), "mmu": (1, 1, .5, .25, 0)}


@pytest.mark.parametrize("backbone, shared, padding, backend", [
    ("showo", False, "none", "aot_eager"), ("emu3", False, "left", "aot_eager"),
    ("showo", True, "left", "eager"), ("emu3", True, "none", "eager")])
def test_one_graph_under_compile(backbone, shared, padding, backend):
    """Forward and backward with top-k compile to one graph a task without a break, and a second
    batch of the same shape compiles nothing: dense, T2I-MoD, MMU-MoD and Shared-MoD layers, a
    skipped one, routers of their own and shared.
    """
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plan = Plan(KINDS, shared)
    assert [plan.kind(layer) for layer in range(4)] == ["dense", "T2I-MoD", "MMU-MoD", "Shared-MoD"]
    model = build(tiny(backbone, n_layer=5), plan, dtype=torch.float32)
    weights, compiled = list(model.parameters()), torch.compile(model, backend=backend, fullgraph=True)
    for task, seed in itertools.product(("t2i", "mmu"), (0, 1)):
        inputs = layout(model.config, task, 2, 9, seed, padding)
        with torch._dynamo.config.patch(error_on_recompile=seed == 1):
            slow, fast = model(task=task, **inputs), compiled(task=task, **inputs)
        torch.testing.assert_close(fast.logits, slow.logits)
        for one, two in zip(slow.routing, fast.routing):
            assert (one is None) == (two is None) and (one is None or torch.equal(one.indices, two.indices))
        for one, two in zip(*(torch.autograd.grad(out.logits.square().sum(), weights, materialize_grads=True)
                              for out in (slow, fast))):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


# ---------------------------------------------------------------- errors

IDS = torch.zeros(2, 5, dtype=torch.long)


@pytest.mark.parametrize("arguments, message", [
    (dict(task="lm"), "unknown task 'lm': this model's plan knows t2i, mmu"),
    (dict(routing="top-k"), "routing must be one of topk, predicted, causal, got 'top-k'"),
    (dict(ids=IDS[0]), r"ids must be \(B, T\) long with B, T >= 1, got \(5,\) torch.int64"),
    (dict(ids=IDS.int()), r"got \(2, 5\) torch.int32"),
    (dict(ids=IDS[:, :0]), r"with B, T >= 1, got \(2, 0\)"),
    (dict(ids=IDS.repeat(1, 13)), "65 tokens, but max_length is 64: shorten the sequence"),
    (dict(positions=IDS[:, :4]), r"positions must have the shape of ids \(2, 5\), got \(2, 4\)"),
    (dict(spans=IDS[:1]), r"spans must have the shape of ids \(2, 5\), got \(1, 5\)"),
    (dict(valid=IDS), r"valid must be bool \(pass mask != 0\), got torch.int64"),
    (dict(ids=IDS - 1), r"ids lie in \[-1, -1\], the vocabulary is \[0, 30\)"),
    (dict(ids=IDS + 30), r"ids lie in \[30, 30\], the vocabulary is \[0, 30\)"),
])
def test_forward_rejects(arguments, message):
    """A call that cannot be right is a ValueError that says what to pass."""
    model = UnifiedTransformer(tiny("emu3"), routed(1, .5, 1))
    with pytest.raises(ValueError, match=message):
        model(**dict(ids=IDS) | arguments)


def test_the_cache_counts_towards_max_length():
    """Tokens in the cache and new ones together must fit into max_length."""
    model = UnifiedTransformer(tiny("emu3", max_length=7))
    cache = Cache(model, "t2i", 2, 20)
    model(IDS, cache=cache, routing="causal")
    with pytest.raises(ValueError, match="10 tokens, but this cache and its model take 7 at most"):
        model(IDS, cache=cache, routing="causal")


def test_plan_of_another_depth():
    """A plan for another number of layers is refused when the model is made."""
    with pytest.raises(ValueError, match="the plan has 4 layers, the model 3: make one for this model"):
        UnifiedTransformer(tiny("showo"), Plan.dense(4))


@given(st.integers(1, 3), st.sampled_from(((4, 4), (4, 2), (6, 1))), st.booleans(), st.integers(0, 99))
def test_repeated_keys_are_grouped_keys(batch, heads, masked, seed):
    """Where a device has no kernel for grouped keys under a mask they are repeated: the same
    attention.
    """
    torch.manual_seed(seed)
    (H, G), T = heads, 5
    q, k, v = (torch.randn(batch, n, T, 8, dtype=torch.float64) for n in (H, G, G))
    mask = torch.rand(batch, 1, T, T) < 0.5
    mask = mask | torch.eye(T, dtype=torch.bool) if masked else None
    plain = transformer.attend(q, k, v, mask)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformer, "EXPANDED", ("cpu",))
        torch.testing.assert_close(transformer.attend(q, k, v, mask), plain)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_fresh_weights_have_the_spread_that_they_should(backbone):
    """0.02 everywhere, and 0.02 / sqrt(2 L) where a block writes into the residual stream."""
    config = ModelConfig(backbone, 8, 4, 4, 64, 128, 300, 32, 200)
    model = UnifiedTransformer(config, Plan.mod(8))
    for name, weight in model.named_parameters():
        if weight.ndim > 1 and "routers" not in name:
            writes = name.endswith(("attention.out.weight", "mlp.down.weight"))
            assert weight.std().item() == pytest.approx(0.02 / 4 if writes else 0.02, rel=0.1), name

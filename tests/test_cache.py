"""unimod_mini.cache: decoding behind a cache against the one causal forward, and what the cache
holds, in float64.
"""
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers import BACKBONES, build, calls, keeps, plans, real, seeds, tiny
from unimod_mini import cache as cache_module
from unimod_mini.cache import Cache
from unimod_mini.plan import Plan, capacity
from unimod_mini.routers import TaskRouter
from unimod_mini.transformer import UnifiedTransformer

near = dict(rtol=0, atol=1e-9)
everything = dict(backbone=st.sampled_from(BACKBONES), task=st.sampled_from(("t2i", "mmu")), plan=plans(), data=st.data())
paddings = st.sampled_from(("none", "left", "holes"))


def one_plan(*keep, **changes):
    return Plan({"t2i": keep, "mmu": keep}, **changes)


def cuts(inputs, data):
    """Any places to cut the sequence that lie inside no span (padding inside a span belongs to
    it).
    """
    T, inside = inputs["ids"].shape[1], set()
    for row in (inputs["spans"] if inputs["spans"] is not None else []):
        for n in row.unique()[row.unique() != 0]:
            where = (row == n).nonzero().flatten().tolist()
            inside |= set(range(where[0] + 1, where[-1] + 1))
    free = [cut for cut in range(1, T) if cut not in inside]
    return sorted(data.draw(st.sets(st.sampled_from(free)))) if free else []


@torch.no_grad()
def feed(model, task, inputs, edges, cache=None):
    """The tokens in chunks that end at `edges` -> logits (B, T, V), membership (B, T) by layer,
    the cache.
    """
    B, T = inputs["ids"].shape
    cache, outs = cache or Cache(model, task, B, T), []
    for start, stop in zip([0, *edges], [*edges, T]):
        chunk = {name: x[:, start:stop] for name, x in inputs.items() if x is not None}
        outs.append(model(task=task, routing="causal", cache=cache, **chunk))
    chosen = [None if layer[0] is None else torch.cat([r.selected for r in layer], 1)
              for layer in zip(*(out.routing for out in outs))]
    return torch.cat([out.logits for out in outs], 1), chosen, cache


@settings(max_examples=150, deadline=None)
@given(**everything, ties=st.booleans())
def test_any_chunks_equal_the_full_forward(backbone, task, plan, data, ties):
    """Cuts that spare the spans, padding and spans anywhere, fresh routers that tie: the logits and
    the membership of one causal forward; and every layer's cache holds exactly its routed tokens,
    by position, row for row.
    """
    model = build(tiny(backbone), plan)
    if ties:
        for name, weight in model.named_parameters():
            if "score" in name:
                weight.data.zero_()
    inputs = data.draw(calls(model.config, places="default", padding=paddings))
    full, ok = model(task=task, routing="causal", **inputs), real(inputs)
    logits, chosen, cache = feed(model, task, inputs, cuts(inputs, data))
    torch.testing.assert_close(logits[ok], full.logits[ok], **near)
    for a, b in zip(chosen, full.routing):
        assert a is b is None or torch.equal(a, b.selected)
    place = ok.cumsum(1) - 1
    for layer, keep, kept in zip(cache.layers, plan.keep[task], chosen):
        if keep == 0:
            assert layer is None
            continue
        kept = ok if kept is None else kept
        assert layer.counts == kept.sum(1).tolist()
        for row, count in enumerate(layer.counts):
            if count:
                assert layer.positions[row, :count].tolist() == place[row][kept[row]].tolist()


@pytest.mark.parametrize("by_row", ((), ("cpu",)))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(**everything)
def test_a_row_equals_the_row_alone(monkeypatch, by_row, backbone, task, plan, data):
    """Decoding a padded batch one token at a time gives each row's logits as if it were decoded
    alone, unpadded; row by row, as on a CPU, and side by side, as on a GPU.
    """
    monkeypatch.setattr(cache_module, "BY_ROW", by_row)
    model = build(tiny(backbone), plan)
    inputs = data.draw(calls(model.config, places="default", padding=paddings, spans=False))
    logits, _, _ = feed(model, task, inputs, range(1, inputs["ids"].shape[1]))
    for b, ok in enumerate(real(inputs)):
        alone, _, _ = feed(model, task, {"ids": inputs["ids"][b:b + 1, ok]}, range(1, int(ok.sum())))
        torch.testing.assert_close(logits[b, ok], alone[0], **near)


@pytest.mark.parametrize("backbone", BACKBONES)
@settings(max_examples=25, deadline=None)
@given(data=st.data(), task=st.sampled_from(("t2i", "mmu")))
def test_a_dense_plan_is_the_dense_model(backbone, task, data):
    """Without routed layers cached decoding gives the logits of the uncached model under either
    rule.
    """
    model = build(tiny(backbone))
    inputs = data.draw(calls(model.config, places="default", padding=paddings))
    logits, _, _ = feed(model, task, inputs, cuts(inputs, data))
    for rule in ("topk", "causal"):
        torch.testing.assert_close(logits[real(inputs)], model(task=task, routing=rule, **inputs).logits[real(inputs)],
                                   **near)


@pytest.mark.parametrize("backbone", BACKBONES)
@settings(max_examples=40, deadline=None)
@given(keep=st.lists(keeps, min_size=3, max_size=3), data=st.data(), force=st.booleans())
def test_bytes(backbone, keep, data, force):
    """nbytes is what the tensors take and nbytes(used=True) the routed tokens' part, also after
    growing; a layer with keep 0 has no cache; memory starts at the plan's capacity and follows a
    row that keeps every token.
    """
    model = build(tiny(backbone), one_plan(*keep))
    if force:                                              # every token wants in
        for threshold in model.buffers():
            threshold.fill_(-1e9)
    inputs = data.draw(calls(model.config, places="default", padding="left", spans=False))
    logits, _, cache = feed(model, "mmu", inputs, cuts(inputs, data))
    torch.testing.assert_close(logits[real(inputs)], model(task="mmu", routing="causal", **inputs).logits[real(inputs)],
                               **near)
    config, (B, T) = model.config, inputs["ids"].shape
    total, used = 2 * 8 * B, 0                             # the two counters of the whole cache
    # k and v in float64, a position in int32
    a_token = 2 * config.n_kv_head * config.head_width * 8 + 4
    for layer, share in zip(cache.layers, keep):
        if layer is not None:
            counts = layer.counts
            assert layer.n_slot == max(capacity(share, T), 1) or capacity(share, T) < max(counts) <= layer.n_slot <= T
            total += B * layer.n_slot * a_token if max(counts) else 0
            used += sum(counts) * a_token
    assert cache.nbytes() == total and cache.nbytes(used=True) == used
    assert [layer is None for layer in cache.layers] == [share == 0 for share in keep]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_skipped_tokens_run_no_block(backbone):
    """While decoding a batch, each block sees exactly the tokens that its layer routes, and none
    when it routes none.
    """
    model = build(tiny(backbone), one_plan(1, .4, .3), seed=3)
    ran = [[] for _ in model.blocks]
    for block, seen in zip(model.blocks, ran):
        block.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].shape[1]))
    ids = torch.randint(30, (4, 16), generator=torch.Generator().manual_seed(0))
    _, chosen, _ = feed(model, "mmu", {"ids": ids}, range(1, 16))
    assert ran[0] == [4] * 16
    for seen, kept in zip(ran[1:], chosen[1:]):
        assert seen == [n for n in kept.sum(0).tolist() if n] and 0 < sum(seen) < 64 and min(kept.sum(0)) < 4


@pytest.mark.parametrize("backbone", BACKBONES)
@settings(max_examples=30, deadline=None)
@given(plan=plans(), data=st.data(), seed=seeds)
def test_rewind_forgets(backbone, plan, data, seed):
    """After rewind(mark) the cache answers as if what came after the mark had never been fed,
    image positions too.
    """
    model = build(tiny(backbone, image_positions=4), plan)
    ids = torch.randint(30, (2, 12), generator=torch.Generator().manual_seed(seed))
    cut, other = data.draw(st.integers(1, 8)), torch.flip(ids, (1,))
    plain, _, _ = feed(model, "mmu", {"ids": ids}, [cut])
    cache = Cache(model, "mmu", 2, 12)
    with torch.no_grad():
        model(ids[:, :cut], task="mmu", routing="causal", cache=cache)
        mark, used = cache.mark(), cache.nbytes(used=True)
        model(other[:, cut:], task="mmu", routing="causal", cache=cache)
        cache.rewind(mark)
        assert cache.nbytes(used=True) == used
        again = model(ids[:, cut:], task="mmu", routing="causal", cache=cache).logits
    torch.testing.assert_close(again, plain[:, cut:], **near)


def test_where_a_span_ended_is_known_row_by_row():
    """A row that is padding throughout a chunk stands where it stood, whatever span lies under its
    padding; rewind brings back where the rows stood.
    """
    model = build(tiny("showo"), one_plan(1, .5, 1))
    ids, spans = torch.randint(30, (2, 3)), torch.ones(2, 3, dtype=torch.long)
    valid = torch.tensor([[True] * 3, [False] * 3])
    with torch.no_grad():
        cache = Cache(model, "mmu", 2, 12)
        # row 0 ends in span 1
        model(ids, task="mmu", routing="causal", cache=cache, spans=spans, valid=valid)
        mark = cache.mark()
        model(ids, task="mmu", routing="causal", cache=cache, spans=2 * spans - valid.long(), valid=~valid)  # row 1 in 2
        with pytest.raises(ValueError, match="a chunk cuts a bidirectional span"):
            # row 0 goes on with 1
            model(ids, task="mmu", routing="causal", cache=cache, spans=spans, valid=valid)
        cache.rewind(mark)
        model(ids, task="mmu", routing="causal", cache=cache, spans=2 * spans - valid.long(), valid=~valid)
        cache.rewind(mark)
        with pytest.raises(ValueError, match="a chunk cuts a bidirectional span"):
            model(ids, task="mmu", routing="causal", cache=cache, spans=spans, valid=valid)
        # row 1 begins: allowed
        model(ids, task="mmu", routing="causal", cache=cache, spans=spans, valid=~valid)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_rows_that_finish_early(backbone):
    """A row whose later tokens are padding stores nothing more, and the others go on
    undisturbed.
    """
    model = build(tiny(backbone), one_plan(1, .5, .5))
    ids = torch.randint(30, (3, 10), generator=torch.Generator().manual_seed(1))
    valid = torch.arange(10) < torch.tensor([[10], [4], [7]])
    logits, _, cache = feed(model, "mmu", {"ids": ids, "valid": valid}, range(3, 10))
    for b, n in enumerate((10, 4, 7)):
        alone = model(ids[b:b + 1, :n], task="mmu", routing="causal").logits[0]
        torch.testing.assert_close(logits[b, :n], alone, **near)
    assert cache.layers[0].counts == [10, 4, 7] == cache.n_valid.flatten().tolist()


@pytest.mark.parametrize("backbone", BACKBONES)
def test_bf16_with_membership_forced(backbone, monkeypatch):
    """In bf16 a score may fall on the other side of its threshold; with the membership given by
    position the cached logits are the uncached ones up to bf16 noise, and no later token reaches an
    earlier logit.
    """
    monkeypatch.setattr(TaskRouter, "causal_selection",
                        lambda self, scores, logits, task, keep, context, before=None:
                        (context.positions * 5 % 7 < 7 * keep) & (True if context.valid is None else context.valid))
    model = build(tiny(backbone), one_plan(1, .5, .3), dtype=torch.bfloat16)
    ids = torch.randint(30, (2, 14), generator=torch.Generator().manual_seed(2))
    full = model(ids, task="mmu", routing="causal").logits
    logits, _, cache = feed(model, "mmu", {"ids": ids}, [5, *range(6, 14)])
    assert cache.layers[1].k.dtype == torch.bfloat16
    assert (logits - full).abs().max() < 0.05 * full.abs().max()
    changed = model(torch.cat((ids[:, :9], ids[:, 9:].flip(1)), 1), task="mmu", routing="causal").logits
    assert torch.equal(changed[:, :9], full[:, :9]) and not torch.equal(changed[:, 9:], full[:, 9:])


@pytest.mark.parametrize("keep", (0.0, 0.4, 1.0))
def test_length_one(keep):
    """One row of one token, then one more, at every kind of layer."""
    model = build(tiny("emu3"), one_plan(keep, keep, keep))
    ids = torch.tensor([[3, 4]])
    logits, _, _ = feed(model, "t2i", {"ids": ids}, [1])
    torch.testing.assert_close(logits, model(ids, task="t2i", routing="causal").logits, **near)


def test_a_chunk_of_padding_alone():
    """A chunk without a valid token stores nothing and moves no position."""
    model = build(tiny("emu3"), one_plan(1, .5, 1))
    cache = Cache(model, "mmu", 2, 8)
    with torch.no_grad():
        model(torch.zeros(2, 3, dtype=torch.long), task="mmu", routing="causal", cache=cache,
              valid=torch.zeros(2, 3, dtype=torch.bool))
    assert cache.nbytes(used=True) == 0 and cache.n_valid.tolist() == [[0], [0]] and cache.length == 3


@pytest.mark.parametrize("case, message", [
    (dict(routing="topk"), 'a cache needs routing="causal"'),
    (dict(task="t2i"), "this cache is for 2 rows of 'mmu', got 2 of 't2i'"),
    (dict(ids=torch.zeros(3, 2, dtype=torch.long)), "this cache is for 2 rows of 'mmu', got 3 of 'mmu'"),
    (dict(positions=torch.zeros(2, 2, dtype=torch.long)), "positions are counted by the cache"),
    (dict(ids=torch.zeros(2, 9, dtype=torch.long)), "9 tokens, but this cache and its model take 8 at most"),
])
def test_calls_that_cannot_be_right(case, message):
    """A cache used for another task, other rows, explicit positions or too many tokens is a
    ValueError.
    """
    model = UnifiedTransformer(tiny("emu3"), one_plan(1, .5, 1))
    call = dict(ids=torch.zeros(2, 2, dtype=torch.long), task="mmu", routing="causal", cache=Cache(model, "mmu", 2, 8))
    with pytest.raises(ValueError, match=message):
        model(**call | case)


@pytest.mark.parametrize("cut", range(1, 10))
def test_a_chunk_that_cuts_a_span(cut):
    """A span in two chunks would be routed and masked wrongly: a ValueError, also when padding
    lies at the cut.
    """
    model = build(tiny("showo"), one_plan(1, .5, 1))
    ids, spans = torch.arange(20).view(2, 10), torch.tensor([[0, 0, 1, 1, 1, 1, 1, 0, 0, 0]] * 2)
    valid = torch.ones(2, 10, dtype=torch.bool)
    valid[:, 4] = False
    for inputs in ({"ids": ids, "spans": spans}, {"ids": ids, "spans": spans, "valid": valid},
                   {"ids": ids, "spans": spans * valid, "valid": valid}):
        if 2 < cut < 7:
            with pytest.raises(ValueError, match="a chunk cuts a bidirectional span: feed all its tokens in one call"):
                feed(model, "t2i", inputs, [cut])
        else:
            feed(model, "t2i", inputs, [cut])


def test_padding_goes_on_with_no_span():
    """A row that has ended may be padded with anything, the span it ended in included."""
    spans, valid = torch.tensor([[0, 1, 1, 0], [0, 1, 1, 1]]), torch.tensor([[True] * 4, [True] * 3 + [False]])
    feed(build(tiny("showo"), one_plan(1, .5, 1)), "mmu", {"ids": torch.arange(8).view(2, 4), "spans": spans,
                                                           "valid": valid}, [3])


@pytest.mark.parametrize("backbone", BACKBONES)
def test_rows_that_begin_late(backbone):
    """A chunk that is the first of one row and the second of another: each token sees its own
    row's earlier ones.
    """
    model = build(tiny(backbone), one_plan(1, 1, 1))
    ids = torch.arange(10).view(2, 5)
    valid = torch.tensor([[False, False, True, True, True], [True, True, True, False, False]])
    logits, _, _ = feed(model, "mmu", {"ids": ids, "valid": valid}, [2])
    full = model(ids, task="mmu", valid=valid, routing="causal").logits
    torch.testing.assert_close(logits[valid], full[valid], **near)


def test_a_cache_grows_by_halves():
    """A row that needs more than the plan's capacity gets half as much again, up to max_length,
    not a slot at a time.
    """
    model, sizes = build(tiny("emu3"), one_plan(.1, 1, 1)), []
    model.router(0, "mmu").threshold_mmu.fill_(-math.inf)  # routes every token
    cache = Cache(model, "mmu", 1, 40)
    for i in range(40):
        model(torch.tensor([[i % 30]]), task="mmu", routing="causal", cache=cache)
        sizes.append(cache.layers[0].n_slot)
    assert list(dict.fromkeys(sizes)) == [4, 6, 9, 13, 19, 28, 40]


def test_what_is_stored_carries_no_gradient():
    """Without no_grad the cache still holds plain numbers, and a step does not drag the last
    one's graph along.
    """
    model = build(tiny("emu3"), one_plan(1, .5, 1))
    cache = Cache(model, "mmu", 1, 8)
    for i in range(3):
        logits = model(torch.tensor([[i]]), task="mmu", routing="causal", cache=cache).logits
    assert not cache.layers[0].k.requires_grad and logits.requires_grad


def test_another_dtype_in_a_later_chunk():
    """Keys of another dtype than those stored are a ValueError, and the cache stays as it was."""
    model = build(tiny("emu3"), one_plan(1, 1, 1), dtype=torch.float32)
    cache = Cache(model, "mmu", 1, 8)
    with torch.no_grad():
        model(torch.tensor([[1, 2]]), task="mmu", routing="causal", cache=cache)
        with pytest.raises(ValueError, match="this cache holds torch.float32, the new keys are torch.float64"):
            model.double()(torch.tensor([[3]]), task="mmu", routing="causal", cache=cache)
    assert cache.length == 2 and cache.layers[0].counts == [2]


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("layer", range(3))
def test_a_chunk_that_failed_half_way_is_forgotten(backbone, layer):
    """An error in any layer: the same chunk, fed again, gives the logits and the counts of a
    cache that met no error.
    """
    model = build(tiny(backbone, image_positions=4), one_plan(1, .5, .7))
    (a, b), logits = (torch.tensor([[1, 21, 22], [2, 3, 23]]), torch.tensor([[4, 24], [25, 5]])), []
    for fails in (False, True):
        cache = Cache(model, "mmu", 2, 9)
        with torch.no_grad():
            model(a, task="mmu", routing="causal", cache=cache)
            if fails:
                hook = model.blocks[layer].register_forward_hook(lambda *_: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    model(b, task="mmu", routing="causal", cache=cache)
                hook.remove()
            logits.append(model(b, task="mmu", routing="causal", cache=cache).logits)
        counts = [one.counts for one in cache.layers]
        assert cache.n_image.flatten().tolist() == [3, 2] and counts == (counts if not fails else before)
        before = counts
    assert torch.equal(*logits)


@pytest.mark.parametrize("dtype", (torch.int32, torch.uint8))
def test_spans_of_another_integer_type(dtype):
    """Behind a cache spans may be of any integer type, as without one."""
    model = build(tiny("showo"), one_plan(1, .5, 1))
    ids, spans = torch.tensor([[1, 2, 21, 22, 23]]), torch.tensor([[0, 0, 1, 1, 1]])
    cache = Cache(model, "t2i", 1, 8)
    model(ids[:, :2], task="t2i", routing="causal", cache=cache)
    logits = model(ids[:, 2:], task="t2i", spans=spans[:, 2:].to(dtype), routing="causal", cache=cache).logits
    whole = model(ids, task="t2i", spans=spans, routing="causal").logits
    assert torch.allclose(logits, whole[:, 2:], atol=1e-12)


def test_a_cache_of_another_model():
    """A cache holds keys of one model: another one refuses it, whatever its shape."""
    one, two = (build(tiny("emu3"), one_plan(1, .5, 1), seed) for seed in (0, 1))
    with pytest.raises(ValueError, match="this cache was made for another model: make a new one"):
        two(torch.tensor([[1]]), task="mmu", routing="causal", cache=Cache(one, "mmu", 1, 8))


def test_a_cache_for_an_unknown_task():
    """Cache(model, task): the task must be one of the plan's."""
    model = UnifiedTransformer(tiny("emu3"), one_plan(1, .5, 1))
    with pytest.raises(ValueError, match="unknown task 'lm': this model's plan knows t2i, mmu"):
        Cache(model, "lm", 2, 8)

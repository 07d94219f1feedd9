"""benchmarks/step.py: its flags, plans, arithmetic and files.

The figures themselves are for a quiet machine.
"""
import gc
import json
import sys
import weakref
import xml.etree.ElementTree as xml
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import step, timing
from benchmarks.growth import counted_equal_at, draw, fit, laws
from benchmarks.timing import FEWEST, bootstrap, race, summary
from unimod_mini import ModelConfig, Plan, UnifiedTransformer, count_flops, flops_ratio
from unimod_mini.flops import activation_bytes

ROW = {"saving", "task", "layers", "length", "batch", "keep", "routed_layers", "flops_saved", "flops_saved_live",
       "pairs", "dense_ms", "unimod_ms", "dense_spread", "unimod_spread", "time_saved", "time_saved_interval",
       "realised", "realised_interval", "stopped", "step_has_sync"} | {
       f"{name}_{what}" for name in ("dense", "unimod")
       for what in ("tokens_per_second", "flops", "mfu", "activation_bytes", "peak_bytes")}
TINY = ["--quick", "--device", "cpu", "--seconds", "0", "--width", "32", "--length", "64"]


@pytest.fixture(autouse=True)
def restored():
    """The benchmark seeds torch and raises dynamo's limit: neither reaches another test."""
    limit = torch._dynamo.config.recompile_limit
    with torch.random.fork_rng():
        yield
    torch._dynamo.config.recompile_limit = limit


# ---------------------------------------------------------------- the command line

def test_the_flags_are_frozen():
    """The command line of the benchmark: names and defaults."""
    flags = {a.option_strings[0]: a.default for a in step.arguments()._actions if a.option_strings[0] != "-h"}
    assert flags == {"--backbone": None, "--preset": None, "--width": None, "--layers": None, "--length": None,
                     "--batch": None, "--task": "t2i", "--savings": [.15, .4, .6], "--compile": False, "--graphs": False,
                     "--device": None, "--seconds": None, "--interval": .1, "--quick": False, "--grow": None, "--against-hf": False,
                     "--unrouted": False, "--out": None}


def test_sizes_when_nothing_is_said():
    """Width 384, 8 layers, 512 tokens, batch 4, a minute a plan; a preset keeps its own width
    and depth.
    """
    args = step.parse([])
    assert (args.width, args.layers, args.length, args.batch, args.seconds) == (384, 8, 512, 4, 60)
    config = step.make_config(args)
    assert (config.backbone, config.d_model, config.n_layer, config.head_width) == ("showo", 384, 8, 64)
    config = step.make_config(step.parse(["--preset", "emu3-8b", "--layers", "3", "--length", "10000"]))
    assert (config.d_model, config.n_layer, config.max_length, config.attention_dropout) == (4096, 3, 10000, 0)
    assert step.make_config(step.parse(["--preset", "showo-1.3b"])) == ModelConfig.preset("showo-1.3b")


@pytest.mark.parametrize("arguments, message", [
    (["--preset", "showo-1.3b", "--width", "64"], "--preset fixes width and backbone"),
    (["--preset", "showo-1.3b", "--backbone", "emu3"], "--preset fixes width and backbone"),
    (["--length", "0"], "sizes must be at least 1"), (["--preset", "toy-emu3", "--layers", "0"], "sizes must be at least 1"),
    (["--interval", "0"], "--interval above 0"),
    (["--seconds", "-1"], "--seconds at least 0"), (["--compile", "--graphs"], "--compile and --graphs: choose one"),
    (["--graphs", "--against-hf"], "leave --graphs out")])
def test_options_that_cannot_be(arguments, message, capsys):
    """An option that would not be read, or a size that cannot be, ends in one line."""
    with pytest.raises(SystemExit):
        step.parse(arguments)
    assert message in capsys.readouterr().err


# ---------------------------------------------------------------- plans and batches

SHAPES = ([], ["--backbone", "emu3"], ["--quick"], ["--quick", "--backbone", "emu3"], ["--length", "256"],
          ["--preset", "showo-1.3b", "--length", "1408"], ["--preset", "emu3-8b", "--length", "4096"])


@pytest.mark.parametrize("arguments", SHAPES, ids=" ".join)
@pytest.mark.parametrize("task", ("t2i", "mmu"))
def test_plans_meet_their_savings(arguments, task):
    """15, 40 and 60 % of the counted training FLOPs, to 0.5 % of dense; one keep, in the odd
    layers if that will do.
    """
    args = step.parse(arguments)
    config = step.make_config(args)
    for saving in step.SAVINGS:
        plan = step.plan_for_saving(config, task, args.length, saving)
        saved = 1 - flops_ratio(config, plan, {task: args.length})
        assert abs(saved - saving) <= 0.005
        row = plan.keep[task]
        keeps, routed = set(row) - {1.0}, [layer for layer, keep in enumerate(row) if keep < 1]
        assert len(keeps) == 1 and min(keeps) >= step.FLOOR and not plan.shared_router
        odd, later, every = (list(range(a, config.n_layer, b)) for a, b in ((1, 2), (1, 1), (0, 1)))
        assert routed in (odd, later, every) and (saving > .15 or routed == odd)


def test_savings_out_of_reach():
    """The head is never pruned: a saving that would need it is a ValueError, before anything is
    timed.
    """
    config = step.make_config(step.parse(["--quick"]))
    for saving in (0.9, 1.0, 0.0, -1.0):
        with pytest.raises(ValueError, match="no plan with keeps of 0.1 and more saves"):
            step.plan_for_saving(config, "t2i", 128, saving)
    with pytest.raises(ValueError, match="saves 95%"):
        step.main([*TINY, "--savings", "0.95"])


@pytest.mark.parametrize("task", ("t2i", "mmu"))
def test_batches(task):
    """Show-o has one span of the size that is counted, at the end for t2i and at the front for
    mmu; Emu3 has none.
    """
    config = step.make_config(step.parse(["--quick"]))
    batch, size = step.make_batch(config, task, 3, 100, torch.device("cpu")), step.image_span(config, 100)
    expected = torch.arange(100) >= 100 - size if task == "t2i" else torch.arange(100) < size
    assert 70 < size < 75 and torch.equal(batch.spans.bool(), expected.expand(3, 100)) and batch.valid is None
    assert torch.equal(batch.ids, batch.labels) and batch.ids.max() < config.vocab_size
    assert step.make_batch(config, task, 3, 100, torch.device("cpu"), text=True).spans is None
    emu3 = step.make_config(step.parse(["--quick", "--backbone", "emu3"]))
    assert step.make_batch(emu3, task, 3, 100, torch.device("cpu")).spans is None and step.image_span(emu3, 100) == 0


# ---------------------------------------------------------------- arithmetic on invented timings

def test_summary():
    """Dense 2 s, UniMoD 1.5 s in every pair: a quarter of the time saved; of half the FLOPs that
    is a share of 0.5.
    """
    out = summary([(2.0, 1.5)] * 9, 0.5)
    assert out["time_saved"] == 0.25 and out["realised"] == 0.5 and out["pairs"] == 9
    assert out["time_saved_interval"] == (0.25, 0.25) and out["realised_interval"] == (0.5, 0.5)
    assert (out["dense_ms"], out["unimod_ms"], out["dense_spread"]) == (2000, 1500, 0)


def test_summary_pairs_steps():
    """A machine that slows down tenfold half-way changes both of a pair: the share stays, the
    spread says so.
    """
    out = summary([(1.0, 0.7)] * 6 + [(10.0, 7.0)] * 5, 0.4)
    assert out["realised"] == pytest.approx(0.75) and out["realised_interval"] == pytest.approx((0.75, 0.75))
    assert out["dense_spread"] == pytest.approx(9.0)
    slower = summary([(1.0, 1.2)] * 8, 0.4)
    assert slower["time_saved"] == pytest.approx(-0.2) and slower["realised"] == pytest.approx(-0.5)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=30))
def test_bootstrap(values):
    """The interval lies among the values, holds their median, and is the same every time."""
    low, high = bootstrap(values)
    assert min(values) <= low <= sorted(values)[len(values) // 2] and sorted(values)[(len(values) - 1) // 2] <= high
    assert high <= max(values) and bootstrap(values) == (low, high)


class Invented:
    """A step that takes the seconds that it was given, one after the other, again and again."""

    def __init__(self, *seconds):
        self.given, self.calls = seconds, 0

    def seconds(self):
        self.calls += 1
        return self.given[(self.calls - 1) % len(self.given)]


def test_a_race_ends_when_the_interval_is_narrow_or_the_time_is_over():
    """Constant steps stop at the fewest pairs by "interval", others when the time is over."""
    dense, unimod = Invented(1.0), Invented(0.8)
    out = race(dense, unimod, 0.4, limit=60, width=0.1)
    assert (out["stopped"], out["pairs"], dense.calls, unimod.calls) == ("interval", FEWEST, FEWEST, FEWEST)
    assert out["realised"] == pytest.approx(0.5)
    out = race(Invented(1.0), Invented(0.2, 1.8, 0.5), 0.4, limit=0, width=0.1)
    assert out["stopped"] == "time" and out["pairs"] == FEWEST


@pytest.mark.parametrize("name, peak", [
    ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H200", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12),
    ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("NVIDIA A100 80GB PCIe", 312e12), ("NVIDIA H100 PCIe", None), ("NVIDIA H200 NVL", None),
    ("NVIDIA GeForce RTX 4090", None), ("NVIDIA A1000", None)])
def test_peaks(name, peak):
    """A known module has its peak, everything else none."""
    assert step.peak_flops(name) == peak


def test_costs():
    """MFU counts the plan's own FLOPs over the seconds and the peak; without a peak there is
    none.
    """
    config = step.make_config(step.parse(["--quick"]))
    plan = step.plan_for_saving(config, "mmu", 128, 0.4)
    row = {"length": 128, "batch": 2, "task": "mmu", "unimod_ms": 500.0}
    out, work = step.costs(config, plan, "unimod", row, 1e12), 2 * count_flops(config, plan, "mmu", 128, "train").total
    assert out["unimod_mfu"] == work / 0.5 / 1e12 and out["unimod_tokens_per_second"] == 512
    assert out["unimod_activation_bytes"] == 2 * activation_bytes(config, plan, "mmu", 128, True).total
    assert step.costs(config, plan, "unimod", row, None)["unimod_mfu"] is None


# ---------------------------------------------------------------- runs

@pytest.mark.parametrize("backbone", ("showo", "emu3"))
def test_a_quick_run(backbone, tmp_path, capsys):
    """A run in this process prints one line a plan and writes the promised keys, and nothing but
    the file.
    """
    out = step.main([*TINY, "--backbone", backbone, "--out", str(tmp_path / "step.json")])
    stored = json.loads((tmp_path / "step.json").read_text())
    assert set(stored) == {"device", "hardware", "torch", "preset", "dtype", "compile", "graphs", "optimizer", "interval",
                           "seconds", "memory", "backbone", "width", "rows"}
    assert [row["saving"] for row in stored["rows"]] == [.15, .4, .6] and all(set(row) == ROW for row in stored["rows"])
    assert all(row["pairs"] >= FEWEST and row["dense_ms"] > 0 and row["unimod_ms"] > 0 for row in stored["rows"])
    assert stored["memory"] == "activations of a batch, closed form, float32" and stored["rows"][0]["dense_mfu"] is None
    assert json.loads(json.dumps(out)) == stored and [path.name for path in tmp_path.iterdir()] == ["step.json"]
    text = capsys.readouterr().out
    assert "realised share" in text and len(text.splitlines()) == 6 and "n/a" in text


def test_twins_have_the_same_weights():
    """The UniMoD twin starts from the dense weights; a step moves every parameter that its task
    uses.
    """
    config = step.make_config(step.parse(TINY))
    batches = {"t2i": step.make_batch(config, "t2i", 2, 64, torch.device("cpu"))}
    own = step.Step(lambda: UnifiedTransformer(config, step.plan_for_saving(config, "t2i", 64, 0.4)), batches,
                    torch.device("cpu"))
    before = {name: weight.clone() for name, weight in own.model.named_parameters()}
    assert own.seconds() > 0
    for name, weight in own.model.named_parameters():
        assert torch.equal(weight, before[name]) == (name.startswith("routers.") and ".mmu." in name), name


@pytest.mark.parametrize("task", ("t2i", "mmu"))
@pytest.mark.parametrize("backbone", ("showo", "emu3"))
def test_without_routing(backbone, task, capsys):
    """The unrouted twin runs each block on the first K tokens, in place, with the gate at 1;
    --unrouted times it.
    """
    config = step.make_config(step.parse([*TINY, "--backbone", backbone, "--layers", "3"]))
    plan = Plan({name: (1, .4, 0) for name in ("t2i", "mmu")})
    model, batch = step.Unrouted(config, plan), step.make_batch(config, task, 2, 64, torch.device("cpu"))
    out = model(**batch.inputs(), task=task)
    assert out.routing == [None] * 3
    K, spans = 26, None if batch.spans is None else batch.spans[:, :26]
    x = model.embed_tokens(batch.ids)
    x = x + model.blocks[0](x, *model.context(batch.ids, None, batch.spans, None)[4:6])
    x[:, :K] = x[:, :K] + model.blocks[1](x[:, :K], *model.context(batch.ids[:, :K], None, spans, None)[4:6])
    torch.testing.assert_close(out.logits, model.head(model.norm(x)))
    row = step.main([*TINY, "--backbone", backbone, "--task", task, "--savings", "0.4", "--unrouted"])["rows"][0]
    assert row["unrouted"]["flops_saved"] > row["flops_saved"]  # no router costs anything there
    assert "without routing: " in capsys.readouterr().out


def test_what_the_unrouted_twin_saves():
    """A layer at keep k on the first K tokens costs what a dense layer costs on K tokens; the
    head is whole.
    """
    config, length = step.make_config(step.parse([*TINY, "--layers", "2"])), 64
    plan = Plan({"t2i": (1, .25), "mmu": (1, .25)})
    layer = lambda n: step.count_flops(config, None, "mmu", n, "train").by_layer[1]
    whole = step.count_flops(config, None, "mmu", length, "train").total
    assert step.unrouted_saving(config, plan, "mmu", length) == pytest.approx((layer(length) - layer(16)) / whole)


def test_growth(tmp_path):
    """--grow times every length and depth and draws well-formed SVG with one point for each
    measured row and twin.
    """
    out = step.main([*TINY, "--savings", "0.4", "--layers", "4", "--grow", str(tmp_path / "grow.svg")])
    assert [(row["layers"], row["length"]) for row in out["rows"]] == [(4, 64), (4, 256), (2, 64)]
    assert [row["batch"] for row in out["rows"]] == [2, 1, 2]
    assert set(out["laws"]["length"]) == {"dense", "40% saved"} and out["laws"]["counted_equal_at"] > 0
    root = xml.parse(tmp_path / "grow.svg").getroot()
    assert len(root.findall("{*}circle")) == 2 * 2 + 2 * 2
    assert [path.name for path in tmp_path.iterdir()] == ["grow.svg"]


@given(st.floats(1e-6, 1e-3), st.floats(1e-9, 1e-6))
def test_fit_finds_the_law(a, b):
    """Points of a T + b T^2 give back a and b; with one part alone the other is 0, never below."""
    xs = (256, 512, 1024, 2048, 4096)
    assert fit([(x, a * x + b * x * x) for x in xs], (1, 2)) == pytest.approx((a, b), rel=1e-6)
    assert fit([(x, a * x ** 0.5) for x in xs], (1, 2))[1] == 0.0
    assert fit([(x, b * x ** 3) for x in xs], (1, 2))[0] == 0.0


def test_counted_parts():
    """The T and T^2 parts of the counted FLOPs are equal where they should be: all else against
    the scores.
    """
    config = step.make_config(step.parse([]))
    rows = [{"layers": 8, "length": n, "batch": 1, "dense_flops": count_flops(config, None, "t2i", n, "train").total}
            for n in (256, 4096)]
    parts = count_flops(config, None, "t2i", 1000).by_part
    assert counted_equal_at(rows, 8) == pytest.approx(1000 * (sum(parts.values()) / parts["scores"] - 1))


def test_a_drawing_of_one_point():
    """A single length and depth still make a drawing."""
    rows = [{"layers": 4, "length": 64, "batch": 2, "saving": 0.4, "dense_ms": 3.0, "unimod_ms": 2.0}]
    assert xml.fromstring(draw(laws(rows, 4, 64)))


def test_graphs_need_cuda(capsys):
    """An error at once, before anything is built or printed."""
    with pytest.raises(ValueError, match="--graphs is for one process on a CUDA device"):
        step.main([*TINY, "--savings", "0.4", "--graphs", "--device", "cpu"])
    assert not capsys.readouterr().out


def test_both_of_a_pair_train_by_the_same_rule_and_are_freed(monkeypatch):
    """The rule changes with every other step; a step that is deleted leaves no model behind, gc
    or not.
    """
    config = step.make_config(step.parse(["--quick", "--backbone", "emu3"]))
    batches, seen, original = {"t2i": step.make_batch(config, "t2i", 1, 16, "cpu")}, [], timing.forward_backward
    monkeypatch.setattr(timing, "forward_backward", lambda objective, batches, shares, rules: (
        seen.append(rules["t2i"]) or original(objective, batches, shares, rules)))
    one = timing.Step(lambda: UnifiedTransformer(config), batches, torch.device("cpu"))
    one(), one()
    assert seen == ["topk", "topk", "predicted", "predicted", "topk"]
    kept = weakref.ref(one.model)
    gc.disable()
    try:
        del one
        assert kept() is None
    finally:
        gc.enable()


def test_without_transformers(monkeypatch):
    """--against-hf without the extra is one line that names the pip command."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r'--against-hf needs the extra hf: pip install -e "\.\[hf\]"'):
        step.main([*TINY, "--savings", "0.4", "--against-hf"])


def test_another_text_model_takes_the_same_step(monkeypatch):
    """What stands in for transformers gets all that a training step passes to a model."""
    class Text(torch.nn.Linear):
        def forward(self, input_ids):
            return SimpleNamespace(logits=super().forward(torch.nn.functional.one_hot(input_ids, self.in_features).float()))

    monkeypatch.setattr("benchmarks.text_models.hugging_face", lambda config: Text(config.vocab_size, config.vocab_size))
    args = step.parse(TINY)
    assert step.against_hf(step.make_config(args), args, torch.device("cpu"))["name"] == "Text"


@pytest.mark.parametrize("backbone", ("showo", "emu3"))
def test_against_transformers(backbone):
    """The text model has as many parameters as our dense one and the same step runs on it."""
    pytest.importorskip("transformers")
    args = step.parse([*TINY, "--backbone", backbone])
    config = step.make_config(args)
    total = lambda model: sum(weight.numel() for weight in model.parameters())
    assert total(step.TextModel(config)) == total(UnifiedTransformer(config))
    out = step.against_hf(config, args, torch.device("cpu"))
    assert out["hf_ms"] > 0 and out["ours_ms"] > 0 and out["name"] in ("PhiForCausalLM", "LlamaForCausalLM")

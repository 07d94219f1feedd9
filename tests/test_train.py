"""train_toy.py and what it stands on: flags, losses that fall, thresholds, checkpoints,
evaluation, pictures.
"""
import json
from copy import deepcopy
from dataclasses import replace
from random import Random

import pytest
import torch

import train_toy as toy
from helpers import build
from unimod_mini import (METHODS, ModelConfig, Palette, Pictures, Plan, UnifiedTransformer,
                         WordText, World, arank_table, calibrate, count_flops, flops_ratio,
                         generate_image, generate_text, load_checkpoint, make_optimizers,
                         plan_for_budget, predictor_report, save_checkpoint, train_step,
                         predictor)
from unimod_mini import evaluate as evaluation
from unimod_mini.console import command
from unimod_mini.evaluate import ask_and_judge, blind_accuracy, by_category, draw_and_judge, accuracy
from unimod_mini.draw_and_ask import kept_tokens
from unimod_mini.pictures import save_png, terminal
from unimod_mini.objectives import IGNORE
from unimod_mini.optim import learning_rate
from unimod_mini.predictor import predicted_tokens

BACKBONES = ("showo", "emu3")


def setup(backbone, seed=0, **changes):
    """A world, a tokenizer, a sampler and a small config for them."""
    toy.torch.manual_seed(seed)
    world, tokenizer = toy.make_world(toy.parse(["--backbone", backbone]))
    small = replace(toy.toy_config(backbone, tokenizer), n_layer=2, d_model=64, n_head=2, n_kv_head=2, d_ff=128, **changes)
    return world, tokenizer, toy.Sampler(world, tokenizer, seed, 16, 16), small


def label_entropy(labels):
    """Cross-entropy in nats of a model that knows only how often each label occurs."""
    share_of = torch.bincount(labels[labels != IGNORE]).float()
    share_of = share_of[share_of > 0] / share_of.sum()
    return -(share_of * share_of.log()).sum().item()


@pytest.mark.parametrize("backbone", BACKBONES)
def test_seconds_of_training_beat_the_label_frequencies(backbone, monkeypatch):
    """Both losses fall below what label frequencies alone would reach, dense and then routed (a
    small world).
    """
    monkeypatch.setattr(toy, "World", lambda: World(max_objects=1, n_colors=2, n_shapes=2, n_held_out=0))
    _, _, sampler, config = setup(backbone)
    model = UnifiedTransformer(config)
    for plan in (None, Plan({"t2i": (1, 0.5), "mmu": (1, 0.5)})):
        model = model if plan is None else model.with_plan(plan)
        optimizers = make_optimizers(model)
        history = [train_step(model, optimizers, sampler(), step, learning_rate(step, 100))
                   for step in range(100 if plan is None else 30)]
        for task, batch in sampler(64, 64).items():
            last = sum(losses[task].item() for losses in history[-10:]) / 10
            assert last < 0.8 * label_entropy(batch.labels), (task, plan)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_sampler_repeats_by_seed_and_differs_between_seeds(backbone):
    """Same seed, same batches, to the last id; another seed, other batches."""
    first, again, other = (setup(backbone, seed)[2]() for seed in (0, 0, 1))
    for task in first:
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(first[task], again[task]))
        assert not torch.equal(first[task].ids, other[task].ids)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_toy_presets_are_the_toy_worlds(backbone):
    """The toy presets are what train_toy.py trains, the maximum length apart."""
    _, tokenizer = toy.make_world(toy.parse(["--backbone", backbone]))
    preset = ModelConfig.preset(f"toy-{backbone}")
    assert replace(toy.toy_config(backbone, tokenizer), max_length=preset.max_length) == preset


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("backbone", BACKBONES)
def test_calibrated_thresholds_realise_the_trained_capacity(backbone, dtype):
    """On the batches they were set on, causal routing keeps as many predicted tokens as top-k, up
    to half a group of equal scores (the first layer sees equal tokens as equal); in bf16 too, whose
    scores tie by the dozen.
    """
    _, _, sampler, config = setup(backbone)
    model = UnifiedTransformer(config, Plan({"t2i": (0.5, 0.3), "mmu": (0.7, 1)})).to(dtype)
    for router in model.routers:
        for task_router in router.values():
            torch.nn.init.normal_(task_router.score.weight)
    batches = sampler(8, 8)
    calibrate(model, batches)
    for task, batch in batches.items():
        asked = predicted_tokens(batch, task)
        pairs = zip(*(model(**batch.inputs(), task=task, routing=rule).routing for rule in ("topk", "causal")))
        for topk, causal in pairs:
            if topk is not None:
                logits = causal.predictor[asked].float().sort().values
                # number of its group
                apart = (logits.diff() > 1e-4 * (logits[-1] - logits[0])).long().cumsum(0)
                ties = apart.bincount().max().item() + 1
                assert abs(int(topk.selected[asked].sum()) - int(causal.selected[asked].sum())) <= max(1, ties / 2)
    report = predictor_report(model, batches)
    assert abs(report["capacity_trained"] - report["capacity_realised"]) < 0.05
    assert 0.5 <= report["base_rate"] <= 1 and 0 <= report["accuracy"] <= 1


def test_a_plan_without_routers_has_no_figures_of_predictors(capsys):
    """None, not a perfect score; the table of train_toy.py says n/a."""
    _, _, sampler, config = setup("emu3")
    report = predictor_report(UnifiedTransformer(config, Plan.interleaved(2)), sampler(2, 2))
    assert report.pop("by_layer") == [] and set(report.values()) == {None}
    toy.report_predictors(report | {"by_layer": []})
    assert capsys.readouterr().out.split("\n")[2].split() == ["mean", *["n/a"] * 6]


def test_the_blind_answer_the_same_questions(monkeypatch):
    """blind_accuracy asks the very questions that evaluate asks."""
    asked, world = [], World()
    monkeypatch.setattr(evaluation, "draw_and_judge", lambda *args, **options: [])
    monkeypatch.setattr(evaluation, "ask_and_judge", lambda model, tokenizer, questions, *rest, **options: asked.append(questions) or [])
    evaluation.evaluate(None, None, world, "causal", 30, 5, {})
    answers = {question.text: question.answer for question in asked[0]}
    monkeypatch.setattr(evaluation, "blind_answers", lambda world: answers)
    right = sum(answers[question.text] == question.answer for question in asked[0])
    assert evaluation.blind_accuracy(world, 30, 5) == round(right / 30, 4) > 0.3


def test_float16_is_not_trained():
    """AdamW's epsilon is 0 in it, a step would leave NaN behind; bfloat16 trains."""
    model = UnifiedTransformer(ModelConfig.preset("toy-emu3"))
    with pytest.raises(ValueError, match=r"float16 weights cannot be trained: convert them first, model.float\(\)"):
        make_optimizers(model.half())
    assert len(make_optimizers(model.bfloat16())) == 2


def test_thresholds_are_the_same_however_many_rows_go_at_once(monkeypatch):
    """calibrate row by row, as for logits that would not fit, sets what it sets from the whole
    batch.
    """
    _, _, sampler, config = setup("showo")
    # float64
    model, batches = build(config, Plan({"t2i": (0.5, 0.3), "mmu": (0.7, 1)})), sampler(8, 8)
    calibrate(model, batches)
    whole, rows = [threshold.clone() for threshold in model.buffers()], []
    monkeypatch.setattr(predictor, "LOGITS", 1)
    model.register_forward_pre_hook(lambda _, given, named: rows.append(len(named["ids"])), with_kwargs=True)
    calibrate(model, batches)
    assert set(rows) == {1} and all(map(torch.allclose, model.buffers(), whole)) and any(t != 0 for t in whole)


@pytest.mark.parametrize("backbone, step", [("emu3", 0), ("showo", 0), ("showo", 1)])
def test_predictors_never_move_the_model(backbone, step):
    """Where the router ranks, a training step leaves every other weight at the same bits whatever
    the predictors are: clipping included.
    """
    _, _, sampler, config = setup(backbone)
    one = UnifiedTransformer(config, Plan({"t2i": (0.5, 1), "mmu": (0.7, 0.3)}))
    two, batches = deepcopy(one), sampler(4, 4)
    for name, weight in two.named_parameters():
        if ".predictor." in name:
            weight.data.mul_(100)
    for model in (one, two):
        train_step(model, make_optimizers(model), batches, step, 1.0)
    for (name, a), b in zip(one.named_parameters(), two.parameters()):
        assert torch.equal(a, b) != (".predictor." in name), name


def test_every_other_step_of_the_toy_draws_with_the_predictors_choice():
    """The number of a step reaches the model as its rule: t2i alternates, mmu does not."""
    _, _, sampler, config = setup("emu3")
    model, rules = UnifiedTransformer(config), {"t2i": [], "mmu": []}
    model.register_forward_pre_hook(lambda _, __, given: rules[given["task"]].append(given["routing"]), with_kwargs=True)
    toy.train(model, sampler, 4, 0.0, torch.device("cpu"), "")
    assert rules == {"t2i": ["topk", "predicted"] * 2, "mmu": ["topk"] * 4}


@pytest.mark.parametrize("training", (False, True))
def test_looking_at_a_model_does_not_change_its_mode(training):
    """Drawing, answering, thresholds, reports and ARank run without dropout or gradients, and
    leave a model training if it was.
    """
    _, tokenizer, sampler, config = setup("showo", attention_dropout=0.5)
    model, batches = UnifiedTransformer(config, Plan({"t2i": (0.5, 1), "mmu": (0.7, 1)})).train(training), sampler(1, 1)
    modes = []
    model.register_forward_hook(lambda *_: modes.append((model.training, torch.is_grad_enabled())))
    images = [generate_image(model, tokenizer, "a ring", steps=1) for _ in range(2)]
    assert torch.equal(*images) and generate_text(model, tokenizer, images[0], "describe ?", max_tokens=1) is not None
    calibrate(model, batches), predictor_report(model, batches), arank_table(model, batches)
    kept_tokens(model, tokenizer, batches["mmu"], "mmu")
    assert model.training == training and set(modes) == {(False, False)}
    with pytest.raises(ValueError):
        generate_image(model, tokenizer, "no such words")
    assert model.training == training


def test_learning_rate_warms_up_stays_and_falls():
    """0 < rate <= 1, flat in the middle, close to zero at the end of a decaying phase."""
    rates = [learning_rate(step, 100, warmup=10, decay=0.5) for step in range(100)]
    assert rates[0] == 0.1 and set(rates[10:50]) == {1.0} and rates[-1] == pytest.approx(0.02)
    assert all(a >= b for a, b in zip(rates[50:], rates[51:]))


def test_a_checkpoint_comes_back_equal(tmp_path):
    """Logits, plan and extra data survive a save and a load with weights_only; nothing but the
    file is left behind.
    """
    _, tokenizer, sampler, config = setup("emu3")
    model = UnifiedTransformer(config, Plan({"t2i": (1, 0.5), "mmu": (0.25, 0)}, shared_router=True))
    save_checkpoint(tmp_path / "m.pt", model, note="kept")
    back, extra = load_checkpoint(tmp_path / "m.pt")
    batch = sampler()["mmu"]
    assert torch.equal(back(**batch.inputs(), task="mmu").logits, model(**batch.inputs(), task="mmu").logits)
    assert back.plan == model.plan and extra["note"] == "kept" and not back.training
    assert [path.name for path in tmp_path.iterdir()] == ["m.pt"]
    with pytest.raises(ValueError, match="config, plan is stored from the model: take another name"):
        save_checkpoint(tmp_path / "m.pt", model, plan=None, config={})
    assert load_checkpoint(tmp_path / "m.pt")[0].plan == model.plan
    for dtype in (torch.float64, torch.bfloat16):          # a model comes back in its own precision
        save_checkpoint(tmp_path / "m.pt", deepcopy(model).to(dtype))
        assert {p.dtype for p in load_checkpoint(tmp_path / "m.pt")[0].state_dict().values()} == {dtype}


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", "{}"])
def test_a_foreign_checkpoint_is_refused_by_name(tmp_path, content):
    """An empty, foreign or wrong file: ValueError with the file's name; a missing one:
    FileNotFoundError.
    """
    path = tmp_path / "x.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save({}, path)
    with pytest.raises(ValueError, match="x.pt is not a checkpoint"):
        load_checkpoint(path)
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "missing.pt")


def test_the_command_line_is_frozen():
    """The flags of train_toy.py, their order and their defaults."""
    assert vars(toy.parse([])) == {"backbone": "emu3", "method": "unimod", "steps": None, "device": None,
                                   "precision": "auto", "seed": 0, "images": None, "out": "out/toy"}
    assert METHODS == ("unimod", "one_router", "one_plan", "mod", "interleaved", "early_exit", "dense")
    for bad in (["--backbone", "gpt"], ["--method", "moe"], ["--steps", "1"], ["--steps", "x"], ["--unknown"]):
        with pytest.raises(SystemExit):
            toy.parse(bad)


@pytest.mark.parametrize("arguments, message", [
    (["--device", "toaster"], "error: no device 'toaster' here: choose from"),
    (["--images", "empty"], "error: empty: the folder is missing or empty"),
    (["--images", "bad"], "error: .*metadata.jsonl, line 1: not JSON"),
    (["--out", "bad/metadata.jsonl"], "error: .*File exists: 'bad/metadata.jsonl'"),
])
def test_what_cannot_be_trained_ends_in_one_line(tmp_path, monkeypatch, arguments, message):
    """A device, pictures or a place for the results that are not there: one line names it, and
    nothing is written.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir(), (tmp_path / "bad").mkdir(), (tmp_path / "bad" / "metadata.jsonl").write_text("{")
    before = set(tmp_path.rglob("*"))
    with pytest.raises(SystemExit, match=message), command():
        toy.main([*arguments])
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_a_plan_within_its_budget(method):
    """unimod, its two variants and mod meet the budget, the others keep their own; dense saves
    nothing.
    """
    _, tokenizer, _, config = setup("emu3")
    table = {"t2i": [0.3, 0.2], "mmu": [0.25, 0.2]}
    lengths = {task: tokenizer.length(task) for task in table}
    plan = plan_for_budget(method, table, config, lengths, 0.6)
    ratio = flops_ratio(config, plan, lengths)
    assert ratio == 1 if method == "dense" else ratio <= (0.999 if method in ("interleaved", "early_exit") else 0.6)
    with pytest.raises(ValueError, match="unknown method"):
        plan_for_budget("moe", table, config, lengths, 0.6)


def test_results_are_written_before_they_are_shown(tmp_path, monkeypatch):
    """A terminal that cannot print a picture loses neither the checkpoint nor the metrics."""
    def fails(images):
        raise UnicodeEncodeError("latin-1", "\u2580", 0, 1, "ordinal not in range(256)")
    monkeypatch.setattr(toy, "terminal", fails), monkeypatch.setattr(toy, "report", lambda *args: None)
    monkeypatch.setattr(toy, "judge", lambda *args: {"predictor": {"accuracy": None}})
    with pytest.raises(UnicodeEncodeError):
        toy.main(["--steps", "2", "--method", "dense", "--out", str(tmp_path), "--device", "cpu"])
    assert json.loads((tmp_path / "metrics.json").read_text())["predictor"]["accuracy"] is None
    assert load_checkpoint(tmp_path / "checkpoint.pt")[0].plan == Plan.load(tmp_path / "plan.json")


def test_main_runs_end_to_end_and_writes_its_files(tmp_path, monkeypatch, capsys):
    """Four steps of everything: the four files, the metrics' keys, and a checkpoint that
    answers.
    """
    monkeypatch.setattr(toy, "EVAL_SCENES", 14)
    metrics = toy.main(["--backbone", "showo", "--steps", "4", "--out", str(tmp_path), "--device", "cpu"])
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written == json.loads(json.dumps(metrics))
    assert {"backbone", "method", "seed", "seconds", "parameters", "dense", "topk", "causal", "predictor"} <= set(written)
    for name in ("dense", "topk", "causal"):
        assert {"t2i_accuracy", "mmu_accuracy", "composition", "by_category", "train_flops", "step_ms"} <= set(written[name])
    assert 1 - written["topk"]["train_flops"] / written["dense"]["train_flops"] >= 0.15
    plan, (model, extra) = Plan.load(tmp_path / "plan.json"), load_checkpoint(tmp_path / "checkpoint.pt")
    assert model.plan == plan
    expected = sum(count_flops(model.config, plan, task, 37, "train").total for task in ("t2i", "mmu"))
    assert written["topk"]["train_flops"] == expected
    saved = {n: 1 - flops_ratio(model.config, plan, dict.fromkeys(plan.tasks, 37), "train", dict(zip(("t2i", "mmu"), n)))
             for n in ((1, 1), (36, 16))}                  # one sample of each task, and the samples of a step
    assert written["saved"] == {"samples": round(saved[1, 1], 4), "step": round(saved[36, 16], 4),
                                "whole_run": round(saved[36, 16] * 2 / 6, 4)}
    world, tokenizer = toy.make_world(toy.parse(["--backbone", "showo"]))
    assert extra["tokenizer"]["words"] == tokenizer.text.words
    images = tokenizer.image.decode(world.sample_mmu(1, Random(0))[1])
    assert isinstance(generate_text(model, tokenizer, images[0], "describe ?"), str)
    assert "top-k (non-causal)" in capsys.readouterr().out


def test_judges_say_right_for_right_and_wrong_for_wrong(monkeypatch):
    """With true pictures and answers both judges give 1, with another scene's they give less."""
    world, tokenizer, _, _ = setup("emu3")
    prompts, codes = world.sample_t2i(28, Random(0))
    questions, seen = world.sample_mmu(24, Random(0))
    import unimod_mini.evaluate as evaluate
    for shift, check in ((0, lambda x: x == 1), (5, lambda x: x < 0.6)):
        drawn = codes.roll(shift, 0)
        answers = [questions[i - shift].answer for i in range(24)]
        monkeypatch.setattr(evaluate, "generate_codes", lambda *a, **k: drawn)
        monkeypatch.setattr(evaluate, "generate_text", lambda *a, **k: answers)
        assert check(accuracy(draw_and_judge(None, tokenizer, world, prompts)))
        assert check(accuracy(ask_and_judge(None, tokenizer, questions, seen)))
    for cut in (lambda answer: "", lambda answer: answer[:-1], lambda answer: answer + " and"):
        monkeypatch.setattr(evaluate, "generate_text", lambda *a, **k: [cut(q.answer) for q in questions])
        assert accuracy(ask_and_judge(None, tokenizer, questions, seen)) == 0
    assert by_category([("a", True), ("a", False), ("b", True)]) == {"a": 0.5, "b": 1.0}


class Recorder:
    """A world that remembers what was sampled from it, and generators that get every plain picture
    and every plain question on colours right, and of the held-out ones only the pictures.
    """

    def __init__(self, world, tokenizer):
        self.world, self.tokenizer, self.samples, self.options, self.codes, self.answers = world, tokenizer, [], [], [], []

    def __getattr__(self, name):
        return getattr(self.world, name)

    def sample_t2i(self, n, rng, held_out=False):
        prompts, codes = self.world.sample_t2i(n, rng, held_out)
        self.samples.append(("t2i", held_out, [p.text for p in prompts]))
        self.codes += codes.unbind()
        return prompts, codes

    def sample_mmu(self, n, rng, held_out=False):
        questions, codes = self.world.sample_mmu(n, rng, held_out)
        self.samples.append(("mmu", held_out, [q.text for q in questions]))
        self.answers += [(q.answer if q.category == "color" and not held_out else "no", c) for q, c in zip(questions, codes)]
        return questions, codes

    def generate_codes(self, model, tokenizer, prompts, **options):
        self.options.append(options)
        return torch.stack([self.codes.pop(0) for _ in prompts])

    def generate_text(self, model, tokenizer, pictures, questions, **options):
        self.options.append(options)
        answers, codes = zip(*(self.answers.pop(0) for _ in questions))
        assert torch.equal(pictures, torch.stack(codes))
        return list(answers)


def test_evaluate_counts_what_came_back(monkeypatch):
    """n scenes of each task, then n / 3 held-out ones, each judged once; the rule and the drawing
    options reach the generators; every chunk of pictures has a seed of its own; the seed alone
    decides the scenes.
    """
    import unimod_mini.evaluate as module
    world, tokenizer, _, _ = setup("emu3")

    def run(seed, routing="topk"):
        record = Recorder(world, tokenizer)
        monkeypatch.setattr(module, "generate_codes", record.generate_codes)
        monkeypatch.setattr(module, "generate_text", record.generate_text)
        return record, module.evaluate(None, tokenizer, record, routing, 168, seed, {"temperature": 0.3})

    record, result = run(1)
    assert [(task, held_out, len(texts)) for task, held_out, texts in record.samples] == [
        ("t2i", False, 168), ("mmu", False, 168), ("t2i", True, 56), ("mmu", True, 56)]
    drawn = [o for o in record.options if "seed" in o]
    assert drawn == [{"routing": "topk", "temperature": 0.3, "seed": seed} for seed in (0, 84, 0)]
    assert [o for o in record.options if "seed" not in o] == [{"routing": "topk"}] * 3
    held = result["by_category"].pop("composition")
    assert held["t2i"] == 1 and held["mmu"] < 0.2          # "no" is the right answer to some
    assert result["composition"] == pytest.approx((1 + held["mmu"]) / 2, abs=1e-4)
    assert set(result["by_category"]["t2i"].values()) == {1.0} and len(result["by_category"]["t2i"]) == 7
    shares = result["by_category"]["mmu"]
    assert len(shares) == 6 and shares.pop("color") == 1 and max(shares.values()) < 0.6
    assert result["t2i_accuracy"] == 1 and result["mmu_accuracy"] == pytest.approx((1 + sum(shares.values())) / 6, abs=1e-3)
    assert run(1, "causal")[0].samples == record.samples != run(2)[0].samples


def test_blind_answers_are_far_from_enough():
    """Without the picture nobody gets near the promised accuracy."""
    assert 0.1 < blind_accuracy(World(), 504, 0) < 0.5


def test_pictures_behave_like_a_world():
    """Their own pictures fit their prompts, another's do not; questions carry the caption."""
    images = torch.randint(0, 255, (6, 8, 8, 3), dtype=torch.uint8)
    world = Pictures(images, [f"a b{i}" for i in range(6)], n_codes=24, patch=4)
    prompts, codes = world.sample_t2i(12, Random(0))
    read = world.read(codes)
    assert all(world.fits(p, things) for p, things in zip(prompts, read))
    assert not any(world.fits(p, [f"{p.text}x"]) for p in prompts)
    assert [[q.answer for q in turns] for turns in world.sample_dialogues(12, Random(0), 9)[0]] == [[p.text] for p in prompts]
    assert world.grid == (2, 2) and world.longest_text == 4 and {"b0", "describe", "?"} <= set(world.words)


def test_blanks_in_captions_are_no_words():
    """Answers are words with single blanks between them, so that a caption with more can be
    answered too.
    """
    world = Pictures(torch.zeros(1, 8, 8, 3, dtype=torch.uint8), [" a  red\tcat "])
    text, answer = WordText(world.words), world.sample_mmu(1, Random(0))[0][0].answer
    assert text.decode(text.encode(answer)) == answer == "a red cat"


def test_terminal_and_png_show_every_picture(tmp_path, monkeypatch):
    """A line for two pixel rows, a cell for each pixel; without pillow the pip line is named and
    nothing is written.
    """
    images = Palette(World().patches).decode(World().sample_t2i(3, Random(0))[1])
    lines = terminal(images, "blocks").split("\n")
    assert len(lines) == 4 and all(line.count("▀") == 3 * 8 for line in lines)
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    assert "pip install" in save_png(images, ["a"] * 3, tmp_path / "s.png") and not list(tmp_path.iterdir())
    monkeypatch.undo()
    pytest.importorskip("PIL")
    save_png(images, ["a"] * 3, tmp_path / "s.png")
    assert (tmp_path / "s.png").stat().st_size > 0


def test_thresholds_are_compared_in_full_precision():
    """A threshold midway between two bf16 logits separates them: rounded to bf16 itself it would
    equal one of them.
    """
    router = UnifiedTransformer(setup("emu3")[3], Plan({"t2i": (0.5, 0.3), "mmu": (0.7, 1)})).router(0, "t2i")
    low, high = torch.tensor([1.0, 1.0078125], dtype=torch.bfloat16)         # neighbours in bf16
    router.threshold_t2i.fill_((low.float() + high.float()) / 2)
    assert router.over_threshold(torch.stack((low, high)), "t2i").tolist() == [False, True]
    below, above = low - 0.0078125, high + 0.0078125
    router.threshold_t2i.fill_((high.float() + above.float()) / 2)
    assert router.over_threshold(torch.stack((below, low, high, above)), "t2i").tolist() == [False, False, False, True]


def test_scores_that_are_not_numbers_are_an_error():
    """A NaN in a predictor would keep nothing for ever after: calibrate refuses it by layer and
    task.
    """
    _, _, sampler, config = setup("emu3")
    model = UnifiedTransformer(config, Plan({"t2i": (1, 0.3), "mmu": (1, 1)}))
    model.router(1, "t2i").predictor[0].weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="membership logits of layer 1 for t2i are not finite"):
        calibrate(model, sampler(4, 4))


@pytest.mark.parametrize("height", (1, 2, 3))
def test_every_pixel_row_is_in_the_terminal(height):
    """Two pixel rows share a line of characters; below an odd last row stands that row again."""
    image = torch.arange(height)[:, None, None].expand(height, 1, 3).to(torch.uint8)[None] + 7
    lines = terminal(image, "blocks").split("\n")
    assert len(lines) == -(-height // 2)
    assert f"48;2;{height + 6};{height + 6};{height + 6}m" in lines[-1]

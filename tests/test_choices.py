"""benchmarks/choices.py, where the values of a field go on from one dense model; analysis.py,
tasks.py, quality.py too.
"""
import json
import sys
from dataclasses import replace
from random import Random

import pytest

from benchmarks import analysis, choices, quality, tasks
from unimod_mini import Batch


@pytest.fixture
def run(monkeypatch, capsys):
    monkeypatch.setitem(choices.toy.SETTINGS, "emu3", choices.toy.SETTINGS["emu3"] | {"t2i": 2, "mmu": 2})

    for module, name, few in ((analysis, "ROUTER_STEPS", 1), (analysis, "COMPETING", 2), (analysis, "SAMPLES", 8),
                              (choices, "FRESH", 16), (choices, "SEEN", 16)):
        monkeypatch.setattr(module, name, few)

    def call(*argv, module=choices):
        monkeypatch.setattr(sys, "argv", ["a benchmark", *argv])
        module.main()
        return capsys.readouterr().out.strip().splitlines()
    return call


def test_every_choice_has_its_line(run, tmp_path, monkeypatch):
    """A line for a value of the field: four losses, four accuracies, agreement and base rate.

    The dense model is kept.
    """
    monkeypatch.setitem(choices.FIELDS, "membership", ("router",))
    dense = tmp_path / "dense.pt"
    names, values = (line.split() for line in run("membership", "--steps", "2", "--scenes", "7", "--dense", str(dense))[-2:])
    assert (names[0], values[0]) == ("membership", "router") and len(values) == 12
    saved, *numbers = map(float, values[1:])
    assert 0.39 < saved < 0.41 and all(x > 1 for x in numbers[:4]) and all(0 <= x <= 1 for x in numbers[4:]) and numbers[9] >= 0.5
    assert choices.load_checkpoint(dense)[1]["steps"] == 2


def test_the_methods_of_the_comparison():
    """Those that ARank decides and basic MoD meet the budget, the others save what they save; a
    field changes no plan.
    """
    config = choices.toy.ModelConfig.preset("toy-emu3")
    table = {"t2i": [0.9, 0.5, 0.2, 0.3, 0.6, 0.4, 0.3, 0.2], "mmu": [0.8, 0.2, 0.2, 0.1, 0.3, 0.3, 0.4, 0.6]}
    lengths = {"t2i": 90, "mmu": 100}
    plans = {name: choices.variant("method", name, table, config, lengths, 0.6) for name in choices.FIELDS["method"]}
    saved = {name: 1 - choices.flops_ratio(config, plan, lengths, "train") for name, (plan, changes) in plans.items()}
    for name in ("unimod", "by loss", "by place", "one_router", "one_plan", "mod"):
        assert saved[name] == pytest.approx(0.4, abs=5e-3)
    rows = {task: 1 - choices.flops_ratio(config, plans["by task"][0], {task: lengths[task]}) for task in lengths}
    assert rows == {task: pytest.approx(0.4, abs=2e-3) for task in lengths}
    assert 0 == saved["dense"] < saved["early_exit"] < saved["interleaved"]
    plan, _ = choices.variant("measure", "even", table, config, lengths, 0.6)
    assert plan.keep["t2i"] == plan.keep["mmu"] == (1.0, *[plan.keep["t2i"][1]] * 7) and not plan.shared_router
    assert 0.59 < choices.flops_ratio(config, plan, lengths, "train") <= 0.6
    plan, changes = choices.variant("gate", "tanh", table, config, lengths, 0.6)
    assert (plan, changes) == (plans["unimod"][0], {"gate": "tanh"})


def test_who_ranks_in_training(run, monkeypatch):
    """Two steps of each choice: in turns, the router twice, the predictors twice; questions
    always by the router.
    """
    seen, losses = {"t2i": [], "mmu": []}, choices.objectives.task_losses
    # restored afterwards
    monkeypatch.setattr(choices.objectives, "training_rules", choices.objectives.training_rules)

    def record(model, batch, task, rule):
        seen[task].append(rule)
        return losses(model, batch, task, rule)

    monkeypatch.setattr(choices.objectives, "task_losses", record)
    lines = run("rule", "--steps", "4", "--scenes", "7")
    assert [line.split()[0] for line in lines[-3:]] == ["in", "router", "predictors"]
    assert seen["t2i"][4:] == ["topk", "predicted", "topk", "topk", "predicted", "predicted"]
    assert seen["mmu"] == ["topk"] * 10


def test_without_routers_the_position_decides():
    """The same positions whatever the tokens, in other layers others; every stretch of 30 has the
    layer's share, and causal routing keeps what top-k keeps.
    """
    torch = choices.toy.torch
    keep = (1.0, 0.3, 0.3)
    config = replace(choices.toy.ModelConfig.preset("toy-emu3"), n_layer=3)
    model = choices.toy.UnifiedTransformer(config, choices.Plan({"t2i": keep}))
    choices.without_routers(model)
    ids = torch.randint(0, 100, (4, 90))
    choices.calibrate(model, {"t2i": Batch(ids, None, None, ids)})
    kept = {rule: [routing.selected for routing in model(ids, task="t2i", routing=rule).routing[1:]]
            for rule in ("topk", "causal")}
    for rule, (one, two) in kept.items():
        assert (one == one[:1]).all() and (two == two[:1]).all() and not torch.equal(one, two)
        assert all(abs(int(n) - 9) <= 2 for part in (one, two) for n in part[0].unfold(0, 30, 1).sum(1))
    assert all(map(torch.equal, *kept.values()))


def test_arank_in_the_order_of_the_loss():
    """The values are ARank's; the smallest belongs to the layer that the task's loss misses
    least: here one that is zero.
    """
    torch = choices.toy.torch
    dense = choices.toy.UnifiedTransformer(replace(choices.toy.ModelConfig.preset("toy-emu3"), n_layer=3))
    with torch.no_grad():
        for p in dense.parameters():
            p.normal_(std=0.1)
        for p in (dense.blocks[1].attention.out.weight, dense.blocks[1].mlp.down.weight):
            p.zero_()
        dense.head.weight.normal_()
        ids = torch.randint(0, 100, (4, 12))
        # the whole model is right, so every other layer is missed
        labels = dense(ids, task="mmu").logits.argmax(-1)
    table = choices.by_loss(dense, {"mmu": [0.1, 0.3, 0.2]}, {"mmu": Batch(ids, None, None, labels)})
    assert table["mmu"][1] == 0.1 and sorted(table["mmu"]) == [0.1, 0.2, 0.3]


def test_measures_and_budgets(run, tmp_path):
    """--only runs some of the choices, --budget holds for all of them; a choice does not depend
    on those before it.
    """
    dense = ["--steps", "2", "--scenes", "7", "--dense", str(tmp_path / "dense.pt"), "--budget", "0.5"]
    two = run("measure", *dense, "--only", "rank 0.1", "energy 0.1")[-2:]
    one = run("measure", *dense, "--only", "energy 0.1")[-1:]
    assert [line.split()[:2] for line in two] == [["rank", "0.1"], ["energy", "0.1"]] and two[1:] == one
    assert all(0.49 < float(line.split()[2]) < 0.52 for line in two)


def test_what_cannot_work_is_said_before_training(run, tmp_path, capsys):
    """Too few steps are an error in one line; the folders of files to be written are made."""
    with pytest.raises(SystemExit):
        run("gate", "--steps", "1", "--dense", str(tmp_path / "a" / "dense.pt"))
    assert "--steps must be at least 2, got 1" in capsys.readouterr().err and not (tmp_path / "a").exists()
    with pytest.raises(SystemExit):
        run("gate", "--only", "tanh", "relu")
    assert "--only relu: the choices of gate are linear, sigmoid, tanh" in capsys.readouterr().err


def test_a_foreign_dense_model_is_refused(run, tmp_path, capsys):
    """--dense with a model of another shape: one line that names the file."""
    file = tmp_path / "other.pt"
    other = choices.toy.ModelConfig.preset("toy-showo")
    choices.save_checkpoint(file, choices.toy.UnifiedTransformer(other), steps=2)
    with pytest.raises(SystemExit):
        run("gate", "--dense", str(file))
    assert f"{file} holds another model" in capsys.readouterr().err



def test_observations(run, tmp_path):
    """A line a layer and a column for each number, which the file of JSON has too; a drawing
    beside it.
    """
    file = tmp_path / "new" / "found.json"
    lines = run("observations", "--steps", "2", "--scenes", "7", "--out", str(file), module=analysis)
    found = json.loads(file.read_text())["found"]
    names, rows = lines[1].split(), [line.split() for line in lines[2:10]]
    assert lines[0].startswith("emu3, seed 0, 2 dense steps, 7 scenes a task") and names[0] == "layer"
    assert [row[0] for row in rows] == [*"01234567"] and all(len(row) == len(found) for row in rows)
    for layer, row in enumerate(rows):
        values = [found[name][layer] for name in found if name != "whole"]
        assert row[1:] == ["-" if value is None else f"{value:.3f}" for value in values]
    t2i, mmu = found["won t2i equal"], found["won mmu toy"]
    assert [x is None for x in t2i] == [True, False] * 4 and all(0 < x < 1 for x in (*t2i[1::2], *mmu[1::2]))
    assert lines[11].startswith("rank correlation of ARank with the cross-entropy lost, from layer 1 on: t2i ")
    drawing = file.with_suffix(".svg").read_text()
    assert drawing.startswith("<svg") and drawing.count("<circle") == 8 * 8 + 4 * 4 and "nan" not in drawing


def test_synergy(run, tmp_path):
    """Both tasks, then each alone, dense and UniMoD: every task's scores, and of a task that was
    trained alone no others.
    """
    file = tmp_path / "found.json"
    lines = run("synergy", "--steps", "2", "--scenes", "7", "--out", str(file), module=analysis)
    rows = json.loads(file.read_text())["found"]
    assert [row["model"] for row in rows] == [f"{tasks}, {method}" for tasks in ("t2i + mmu", "t2i", "mmu")
                                              for method in ("dense", "unimod")]
    scores = {task: {f"ce {task}", task, f"held {task}"} for task in ("t2i", "mmu")}
    wanted = [scores["t2i"] | scores["mmu"], scores["t2i"], scores["mmu"]]
    assert [set(row) - {"model"} for row in rows] == [own for own in wanted for _ in range(2)]
    assert [line.split()[-1] for line in lines[-6:]] == [f"{list(row.values())[-1]:.3f}" for row in rows]


def test_plans(run, tmp_path, monkeypatch):
    """A line for each number of samples and for each measure of rank; the keep ratios are the
    plans' own.
    """
    monkeypatch.setattr(analysis, "DRAWS", 2), monkeypatch.setattr(analysis, "COUNTS", (1, 4))
    file = tmp_path / "found.json"
    lines = run("plans", "--steps", "2", "--out", str(file), module=analysis)
    found = json.loads(file.read_text())["found"]
    assert [row["samples"] for row in found["samples"]] == [1, 4] and len(lines) == 2 + len(choices.MEASURES)
    assert all(row[name] >= 0 for row in found["samples"] for name in ("arank", "keep", "kind"))
    assert list(found["measures"]) == list(choices.MEASURES)
    # every layer has full rank: the same keep everywhere
    first = found["measures"]["rank 1e-7"]["t2i"]
    assert len(first) == 8 and max(first) - min(first) < 0.2



def test_readings_can_be_answered_from_their_texts():
    """The scene in words, read back word by word, has exactly the answer; the longest fits the
    task's budget.
    """
    world, tokenizer = tasks.toy.make_world(tasks.toy.parse([]))
    small, asked = replace(world, max_objects=2), Random(0)
    for scene, question in tasks.readings(small, 300, asked):
        things = [part.split()[1:] for part in scene.split(" and ")]  # colour, shape, place
        words = question.text.split()
        if question.category == "color":
            found = [color for color, shape, place in things if words[-2] in (shape, place)]
        elif question.category == "shape":
            found = [shape for _, shape, place in things if place == words[-2]]
        elif question.category == "count":
            kind = words[2].removesuffix("s").removesuffix("e")
            found = [("zero", "one", "two")[sum(kind in ("object", shape.removesuffix("e")) for _, shape, _ in things)]]
        else:                                              # where it is, or no
            found = [place for color, shape, place in things if [color, shape] == words[3:5]] or ["no"]
        assert found == [question.answer], (scene, question)
        tokenizer.lm([f"{scene} {question.text} {question.answer}"])


def test_three_tasks_in_one_model(run, tmp_path, monkeypatch):
    """Three rows of a plan within the budget of a step's FLOPs, three accuracies, dense and
    UniMoD.
    """
    monkeypatch.setattr(tasks, "COUNTS", {"t2i": 2, "mmu": 2, "lm": 2})
    monkeypatch.setattr(tasks, "SWITCH", dict.fromkeys(tasks.COUNTS, 4))
    lines = run("--steps", "2", "--scenes", "14", "--out", str(tmp_path / "found.json"), module=tasks)
    found = json.loads((tmp_path / "found.json").read_text())
    assert 0.39 < found["saved"] < 0.45 and list(found["keep"]) == ["t2i", "mmu", "lm"]
    for label in ("dense", "unimod"):
        assert all(0 <= found[label][task] <= 1 for task in tasks.COUNTS) and set(found[label]["worst"]) == set(tasks.COUNTS)
    assert lines[-3].split()[:3] == ["dense", "t2i", "0.0%"] and lines[-1].startswith("blind in lm: ")


def test_rank_correlation():
    up, down = analysis.rank_correlation([1, 2, 3], [10, 20, 90]), analysis.rank_correlation([3, 2, 1], [1, 4, 5])
    assert up == pytest.approx(1) == -down



@pytest.fixture
def toy_checkpoint(tmp_path):
    """A model of random weights with the toy world's tokenizer, and its file."""
    torch = choices.toy.torch
    _, tokenizer = choices.toy.make_world(choices.toy.parse([]))
    plan = choices.Plan({"t2i": (1, .5, .2, .3, 1, 1, 1, 1), "mmu": (1, .3, 1, .6, .5, 1, 1, 1)})
    model = choices.toy.UnifiedTransformer(choices.toy.toy_config("emu3", tokenizer), plan)
    torch.manual_seed(0)
    for weight in model.routers.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    ids = torch.randint(0, 30, (4, 40))
    choices.calibrate(model, dict.fromkeys(("t2i", "mmu"), Batch(ids, None, None, ids)))
    file = tmp_path / "checkpoint.pt"
    choices.save_checkpoint(file, model, tokenizer=tokenizer.state(), drawing=choices.toy.SETTINGS["emu3"]["drawing"])
    return model, file


def test_a_wrong_label_means_the_other_tasks_decisions(toy_checkpoint):
    """Relabelled, a task keeps what the other kept, to the bit; relabelled again, the model is
    what it was.
    """
    (model, _), torch = toy_checkpoint, choices.toy.torch
    wrong, ids = quality.relabelled(model), torch.randint(0, 30, (2, 40))
    for task, other in quality.OTHER.items():
        right = model(ids, task=other, routing="causal")
        assert torch.equal(wrong(ids, task=task, routing="causal").logits, right.logits)
        assert any(routing is not None and 0 < routing.selected.float().mean() < 1 for routing in right.routing)
    again = quality.relabelled(wrong)
    assert again.plan == model.plan
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))


@pytest.mark.parametrize("labels", [[], ["--labels"]])
def test_quality(run, toy_checkpoint, tmp_path, labels):
    """A line for each task and split, what it says is in the file, and the difference is that of
    the accuracies.
    """
    _, file = toy_checkpoint
    lines = run(str(file), "--scenes", "7", "--out", str(tmp_path / "found.json"), *labels, module=quality)
    rows = json.loads((tmp_path / "found.json").read_text())[str(file)]
    assert lines[-5].split()[1:3] == (["right", "wrong"] if labels else ["top-k", "causal"])
    assert list(rows) == ["t2i", "mmu", "t2i held out", "mmu held out"] and len(lines[-4:]) == 4
    for row in rows.values():
        assert row["points"] == pytest.approx(100 * (row["second"] - row["first"])) and row["scenes"] == 7


def test_what_occurred_in_training(run, toy_checkpoint, tmp_path, monkeypatch):
    """The data that is made again is what train_toy.py trains on: its pictures and captions, and no
    sample of ARank's. Scenes are counted on one side or the other.
    """
    toy = choices.toy
    monkeypatch.setitem(toy.SETTINGS, "emu3", toy.SETTINGS["emu3"] | {"t2i": 3, "mmu": 2, "steps": 4})
    world, tokenizer = toy.make_world(toy.parse([]))
    batches, real = [], toy.train_step
    monkeypatch.setattr(toy, "train_step", lambda model, optimizers, batches_, *rest: (
        batches.append(batches_), real(model, optimizers, batches_, *rest))[1])
    monkeypatch.setattr(toy, "judge", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        toy.main(["--seed", "3", "--out", str(tmp_path)])
    rows = [row for step in batches for batch in step.values() for row in batch.ids.tolist()]
    pictures = {tuple(i - tokenizer.image_start for i in row if tokenizer.image_start <= i < tokenizer.image_end) for row in rows}
    found = quality.training_data(tokenizer, 3)
    assert found.pictures == pictures and len(pictures) > 20
    prompts = [tokenizer.t2i_prompt(caption) for caption in ["", *found.captions]]  # "": dropped
    met = {prompts.index(row[:row.index(tokenizer.special["img"]) + 1]) for step in batches for row in step["t2i"].ids.tolist()}
    assert len(met - {0}) > len(found.captions) / 2
    assert {(picture, text) for picture, text in found.asked if picture in pictures} == found.asked != set()

    _, file = toy_checkpoint
    lines = run(str(file), "--scenes", "7", "--trained-with", "3", "--out", str(tmp_path / "found.json"), module=quality)
    parts = json.loads((tmp_path / "found.json").read_text())[str(file)]
    assert len(lines[-3:]) == len(parts) == 3
    assert all(row["in training"]["scenes"] + row["not"]["scenes"] == 7 for row in parts.values())


def test_a_checkpoint_that_is_not_there_is_named_first(run, capsys):
    """Before the others are judged for hours."""
    with pytest.raises(SystemExit):
        run(__file__, "gone.pt", module=quality)
    assert "gone.pt: no such file" in capsys.readouterr().err


def test_paired_differences():
    """Three scenes, one of them judged otherwise: a third of a point each way, and its standard
    error by hand.
    """
    row = quality.paired([("a", True), ("b", False), ("c", True)], [("a", True), ("b", True), ("c", True)])
    assert (row["first"], row["second"], row["points"]) == pytest.approx((2 / 3, 1, 100 / 3))
    assert row["standard_error"] == pytest.approx(100 / 3) and row["alike"] == pytest.approx(2 / 3)

"""Weights that others trained: pictures that are codes, from .npy files through shards and
train_full.py to answers.
"""
import io
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

import train_full as full
from helpers import build, tar_of, tiny
from launch import changed
from test_pretrained import theirs, write
from unimod_mini import (ByteText, Codes, Plan, Tokenizer, UnifiedTransformer, generate_image,
                         generate_text, layer_switch, load_checkpoint, save_checkpoint)
from unimod_mini.data import prepare
from unimod_mini.train.distributed import Ranks
from unimod_mini.draw_and_ask import main as generate
from unimod_mini.weights.pretrained import config_to_hf
from unimod_mini.data.shards import Shards
from unimod_mini.data.readers import decode, read_source

SIDE, N_CODES = 3, 20
OPTIONS = ["--image", "codes", "--codes", str(N_CODES), "--size", str(SIDE), "--workers", "1", "--text-length", "40"]
TINY = ["--t2i", "4", "--mmu", "4", "--steps", "4", "--warmup", "2", "--eval-samples", "8", "--device", "cpu"]


def picture(i):
    """The codes of picture i, (3, 3)."""
    return np.random.default_rng(i).integers(N_CODES, size=(SIDE, SIDE))


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def folder_of(path, n=12):
    """A folder of .npy files with metadata.jsonl; a third each as (3, 3), as (1, 3, 3), as (1,
    9) in 16 bits.
    """
    path.mkdir()
    for i in range(n):
        shape, dtype = (((SIDE, SIDE), "i8"), ((1, SIDE, SIDE), "u1"), ((1, SIDE**2), "u2"))[i % 3]
        np.save(path / f"{i}.npy", picture(i).reshape(shape).astype(dtype))
    (path / "metadata.jsonl").write_text("".join(json.dumps({"file_name": f"{i}.npy", "text": f"picture {i}"}) + "\n"
                                                 for i in range(n)))
    return path


def run(*arguments):
    prepare.main([str(x) for x in arguments])


def samples_of(folder, task):
    """{question: (answer, codes)} of both splits."""
    shards = Shards(folder)
    found = {}
    for split in ("train", "held"):
        for i in range(shards.count(task, split)):
            sample = shards.sample(task, i, split)
            question, answer = shards.texts(sample)
            found[question] = answer, sample.codes.tolist()
    return found


# ---------------------------------------------------------------- the codec

def test_codes_stay_as_they_are():
    """encode and decode are the identity, to long; pixels, floats and codes out of range are
    refused.
    """
    codec, codes = Codes(20), torch.arange(18).view(2, 3, 3)
    for dtype in (torch.long, torch.int32, torch.uint8):
        for same in (codec.encode(codes.to(dtype)), codec.decode(codes.to(dtype))):
            assert torch.equal(same, codes) and same.dtype == torch.long
    for wrong, message in ((torch.zeros(1, 8, 8, 3, dtype=torch.uint8), r"integer codes \(B, h, w\), got torch.uint8"),
                           (codes.float(), "got torch.float32"), (codes[0], r"\(3, 3\)"),
                           (codes + 3, r"expected \[0, 20\)"),
                           (codes - 1, r"in \[-1, 16\]")):
        with pytest.raises(ValueError, match=message):
            codec.encode(wrong)
    with pytest.raises(ValueError, match="n_codes must be at least 1, got 0"):
        Codes(0)


@pytest.mark.parametrize("backbone", ("showo", "emu3"))
def test_draw_and_ask_in_codes(backbone):
    """generate_image returns codes, generate_text takes them; the tokenizer comes back from its
    state.
    """
    tokenizer = Tokenizer(backbone, ByteText(), Codes(7), (2, 3), 30)
    tokenizer = Tokenizer.from_state(tokenizer.state())
    model = UnifiedTransformer(tiny(backbone, vocab_size=tokenizer.vocab_size, image_start=tokenizer.image_start,
                                    max_length=200), Plan({"t2i": (1, .5, 1), "mmu": (.5, 1, 1)}))
    codes = generate_image(model, tokenizer, ["a", "b"], steps=2)
    assert codes.shape == (2, 2, 3) and codes.dtype == torch.long and 0 <= codes.min() and codes.max() < 7
    assert generate_image(model, tokenizer, "a", steps=2).shape == (2, 3)
    answers = generate_text(model, tokenizer, codes, ["what ?"] * 2, max_tokens=3)
    assert answers[0] == generate_text(model, tokenizer, codes[0], "what ?", max_tokens=3)


# ---------------------------------------------------------------- from files to shards

def test_the_same_codes_in_every_format(tmp_path):
    """A folder, a tar that has pictures beside them, and questions: the codes of the files, to
    the last one.
    """
    folder = folder_of(tmp_path / "a")
    files = {f"{i}.{suffix}": content for i in range(12) for suffix, content in (
        ("jpg", b"not looked at"), ("npy", npy(picture(i))), ("txt", f"picture {i}".encode()))}
    tar_of(tmp_path / "b.tar", files)
    asked = [{"image": f"{i}.npy", "conversations": [{"from": "human", "value": f"<image>\npicture {i}"},
                                                     {"from": "gpt", "value": "yes"}]} for i in range(12)]
    (tmp_path / "q.json").write_text(json.dumps(asked))
    want = {f"picture {i}": ("", picture(i).tolist()) for i in range(12)}
    for source in ("a", "b.tar"):
        run(tmp_path / source, tmp_path / f"out-{source}", *OPTIONS, "--backbone", "showo")
        assert samples_of(tmp_path / f"out-{source}", "t2i") == want
    run(tmp_path / "q.json", tmp_path / "out-q", *OPTIONS, "--image-root", folder)
    assert samples_of(tmp_path / "out-q", "mmu") == {name: ("yes", codes) for name, (_, codes) in want.items()}
    made = {path.name for path in (tmp_path / "out-a").iterdir()}
    assert "reconstruction.png" not in made and "skipped.txt" in made
    shards = Shards(tmp_path / "out-a")
    assert isinstance(shards.tokenizer.image, Codes) and shards.tokenizer.image.n_codes == N_CODES


def test_broken_codes_are_listed(tmp_path):
    """What is no .npy of (3, 3) integers in the range is named with the reason, the rest is
    kept.
    """
    folder = folder_of(tmp_path / "a")
    wrong = {0: npy(picture(0)[:2]), 1: npy(picture(1) + 0.5), 2: npy(picture(2) * 0 + N_CODES), 3: npy(picture(3) - 99),
             4: npy(picture(4))[:90], 5: b"", 6: npy(np.array([{}], dtype=object)), 7: npy(picture(7)[:, None, :2]),
             9: npy(np.zeros((0, 3), int)), 10: npy(picture(10)).replace(b"(3, 3), }", b"(9999999,")}
    np.savez(tmp_path / "z.npz", picture(8))
    wrong[8] = (tmp_path / "z.npz").read_bytes()
    for i, content in wrong.items():
        (folder / f"{i}.npy").write_bytes(content)
    run(folder, tmp_path / "out", *OPTIONS)
    skipped = (tmp_path / "out" / "skipped.txt").read_text().splitlines()
    reasons = {0: "codes are integers (3, 3), this is int64 (2, 3)", 1: "this is float64 (3, 3)", 2: "expected [0, 20)",
               3: "expected [0, 20)", 4: "no .npy of numbers (", 5: "no .npy of numbers (",
               6: "no .npy of numbers (", 7: "this is int64 (3, 1, 2)", 8: "no .npy of numbers (",
               9: "this is int64 (0, 3)", 10: "no .npy of numbers ("}
    assert len(skipped) == len(reasons)
    for i, why in reasons.items():
        assert skipped[i].startswith(f"{i}.npy: ") and why in skipped[i]
    assert sorted(samples_of(tmp_path / "out", "t2i")) == ["picture 11"]


def test_one_code_a_picture(tmp_path):
    """--size 1: a scalar, one number in a row and (1, 1) are the same picture, stored once."""
    (tmp_path / "a").mkdir()
    lines = []
    for i, shape in enumerate(((), (1,), (1, 1))):
        np.save(tmp_path / "a" / f"{i}.npy", np.full(shape, 5))
        lines.append(json.dumps({"file_name": f"{i}.npy", "text": f"text {i}"}))
    (tmp_path / "a" / "metadata.jsonl").write_text("\n".join(lines))
    run(tmp_path / "a", tmp_path / "out", "--image", "codes", "--codes", "6", "--size", "1", "--held", "0")
    assert samples_of(tmp_path / "out", "t2i") == {f"text {i}": ("", [[5]]) for i in range(3)}
    assert Shards(tmp_path / "out").about["pictures"]["train"] == 1


@pytest.mark.parametrize("more, message", [
    (["--codes", "20", "--patch", "4"], "--patch has no effect: codes has its own"),
    (["--codes", "20", "--width", "4"], "--width has no effect: --image codes trains no VQ"),
    ([], "--image codes: say how many there are, --codes 8192 for Show-o"),
    (["--codes", "20", "--size", "4"], r"12 of them for: codes are integers \(4, 4\), this is "
                                       r"int64 \(3, 3\) \(0.npy\)"),
    (["--codes", "0"], "--codes must be at least 1"), (["--codes", str(2**31)], "--codes must be below 2147483648")])
def test_options_that_do_not_fit(tmp_path, more, message):
    """One line that says what to do."""
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        run(folder_of(tmp_path / "a"), tmp_path / "out", "--image", "codes", *more)


def test_emoji_are_no_codes(tmp_path):
    """They are pixels."""
    with pytest.raises(SystemExit, match="error: --image codes: emoji are pixels"):
        run("emoji", tmp_path / "out", *OPTIONS)


def test_a_codec_of_codes_sees_no_pixels(job, tmp_path):
    """--image tokenizer.pt of a data set of codes: refused before a picture is read."""
    with pytest.raises(SystemExit, match=f"its pictures are codes, give --image codes --codes {N_CODES}"):
        run(job[0] / "a", tmp_path / "out", "--image", job[0] / "shards" / "tokenizer.pt")
    assert not (tmp_path / "out").exists()



@pytest.fixture(scope="module", params=("showo", "emu3"))
def job(request, tmp_path_factory):
    """Shards of codes, and a folder of Hugging Face with a model of their vocabulary."""
    root = tmp_path_factory.mktemp(request.param)
    run(folder_of(root / "a"), root / "shards", *OPTIONS, "--backbone", request.param)
    tokenizer = Shards(root / "shards").tokenizer
    sizes = tiny(request.param, vocab_size=tokenizer.vocab_size, image_start=tokenizer.image_start)
    model = build(sizes, dtype=torch.float32)
    write(root / "hf", config_to_hf(model.config), theirs(model))
    return root, model


def begin(root, out, *more):
    config = full.parse(["--data", str(root / "shards"), "--out", str(out), *TINY, *more])
    with changed():
        return full.start(full.make_job(config, Ranks(0, 1, 0), torch.device("cpu")))


@pytest.mark.parametrize("planned", (False, True))
def test_a_run_begins_with_these_weights(job, tmp_path, planned):
    """--init of a folder of Hugging Face: its sizes in place of the preset's, its weights bit by
    bit, dense or with a plan; lengths and first image code are those of the data.
    """
    root, model = job
    plan = Plan({"t2i": (1, .5, 0), "mmu": (.5, 1, 1)})
    plan.save(tmp_path / "plan.json")
    given = ("--plan", str(tmp_path / "plan.json")) if planned else ()
    run = begin(root, tmp_path / "out", "--init", str(root / "hf"), *given)
    longest = run.model.config.max_length
    assert run.model.config == replace(model.config, max_length=longest)
    assert run.model.plan == (plan if planned else Plan.dense(3, ("t2i", "mmu", "lm")))
    state = run.model.state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in model.state_dict().items() if "routers" not in name)
    assert longest >= max(run.lengths.values())


def test_from_codes_to_a_routed_model(job, tmp_path, capsys):
    """Dense, layer switch, UniMoD, drawn codes as .npy; stopped and resumed it is the same model;
    it answers and draws from the command line.
    """
    root, _ = job
    given = ["--data", str(root / "shards"), *TINY, "--init", str(root / "hf"), "--budget", "0.8", "--save-every", "1",
             "--dense", "0.5"]
    with changed():
        full.main([*given, "--out", str(tmp_path / "a")])
        with changed(("term", [3], 0)):
            full.main([*given, "--out", str(tmp_path / "b")])
        full.main([*given, "--out", str(tmp_path / "b"), "--resume", "auto"])
    capsys.readouterr()
    (model, stored), (again, _) = (load_checkpoint(tmp_path / name / "model.pt") for name in "ab")
    assert model.plan == again.plan != Plan.dense(3)
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in model.state_dict().items())
    drawn = np.load(tmp_path / "a" / "samples" / "step-00000004.npy")
    # drawn, and asked about
    assert drawn.shape == (2, SIDE, SIDE) and drawn.min() >= 0 and drawn.max() < N_CODES
    common = ["--checkpoint", str(tmp_path / "a" / "model.pt"), "--device", "cpu", "--explain", "--out",
              str(tmp_path / "x.npy")]
    generate([*common, "--prompt", "picture 1"])
    assert "x.npy written, the codes of 3x3" in capsys.readouterr().out
    tokenizer = Tokenizer.from_state(stored["tokenizer"])
    want = generate_image(model, tokenizer, "picture 1", **stored["drawing"])
    assert np.array_equal(np.load(tmp_path / "x.npy"), want.numpy())
    np.save(tmp_path / "row.npy", want.view(1, -1).numpy().astype(">u2"))  # as prepare takes them
    for name in ("x.npy", "row.npy"):
        generate([*common, "--image", str(tmp_path / name), "--question", "what ?"])
        assert f"what ? {generate_text(model, tokenizer, want, 'what ?')}" in capsys.readouterr().out
    np.save(tmp_path / "half.npy", want.numpy() + 0.5)
    with pytest.raises(SystemExit, match=r"half.npy: codes are integers \(3, 3\), this is float64"):
        generate([*common, "--image", str(tmp_path / "half.npy"), "--question", "what ?"])
    with pytest.raises(SystemExit, match=r"error: .*metadata.jsonl: no .npy of numbers \(ValueError\)"):
        generate([*common, "--image", str(root / "a" / "metadata.jsonl"), "--question", "what ?"])


def test_the_plan_is_of_the_weights_as_they_came(job, tmp_path):
    """--dense 0: the layer switch comes before the first step, and measures the loaded weights."""
    root, model = job
    given = ["--data", str(root / "shards"), *TINY, "--init", str(root / "hf"), "--budget", "0.8", "--dense", "0"]
    with changed():
        made = full.make_job(full.parse([*given, "--out", str(tmp_path / "out")]), Ranks(0, 1, 0), torch.device("cpu"))
        samples = made.batches(full.SWITCH)
        full.main([*given, "--out", str(tmp_path / "out")])
    dense = model.with_plan(Plan.dense(3), max_length=100)
    assert Plan.load(tmp_path / "out" / "plan.json") == layer_switch(dense, samples, 0.8, counts=made.counts)
    stages = [json.loads(line).get("stage") for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert "unimod" in stages and "dense" not in stages


def test_another_vocabulary_is_refused(job, tmp_path):
    """Data of other codes, weights of the other backbone, or of pictures of another size: what both
    have, before anything is written.
    """
    root, model = job
    other = "emu3" if model.config.backbone == "showo" else "showo"
    more = model.config.vocab_size + 1
    for changes, said in (({"vocab_size": more}, str(more)), (None, other)):
        folder = tmp_path / said
        write(folder, config_to_hf(replace(model.config, **changes) if changes else tiny(other)), {})
        with pytest.raises(ValueError, match=f"in --data and .*{said}.* in --init .*: prepare the data with"):
            begin(root, tmp_path / "out", "--init", str(folder))
    save_checkpoint(tmp_path / "4.pt", UnifiedTransformer(replace(model.config, image_positions=4)))
    with pytest.raises(ValueError, match=r"9\) in --data and .*, 4\) in --init"):
        begin(root, tmp_path / "out", "--init", str(tmp_path / "4.pt"))
    assert not (tmp_path / "out").exists()


def test_a_run_needs_its_first_weights_once(job, tmp_path):
    """The folder of the weights may move, or be --out itself: a run goes on from its own
    checkpoint, and its model begins another run, without a preset. With one that has other sizes it
    is refused.
    """
    root, model = job
    folder = shutil.copytree(root / "hf", tmp_path / "hf")
    given = ["--data", str(root / "shards"), *TINY, "--dense", "1", "--save-every", "1", "--out", str(folder)]
    with changed(("term", [2], 0)):
        full.main([*given, "--init", str(folder)])
    for name in ("config.json", "pytorch_model.bin"):
        assert (folder / name).read_bytes() == (root / "hf" / name).read_bytes()
        (folder / name).unlink()
    with changed():
        assert full.main([*given, "--init", str(tmp_path / "elsewhere"), "--resume", "auto"])["step"] == 4
    trained, _ = load_checkpoint(folder / "model.pt")
    for start in (folder, folder / "model.pt", folder / "checkpoints" / "step-00000004"):
        again = begin(root, tmp_path / "again", "--init", str(start)).model
        assert all(torch.equal(weight, again.state_dict()[name]) for name, weight in trained.state_dict().items())
        with pytest.raises(ValueError, match="is another model than the preset .*Without --preset its own sizes"):
            begin(root, tmp_path / "again", "--init", str(start), "--preset", "tiny")


def test_sizes_of_nothing():
    """--preset init needs --init."""
    with pytest.raises(ValueError, match="--preset init takes the sizes of --init, which is not given"):
        full.parse(["--data", "x", "--preset", "init"])


def test_decoding_names_nothing_of_the_machine(tmp_path):
    """The reason of a skipped picture has its key once and no path."""
    folder = folder_of(tmp_path / "a", 1)
    (folder / "0.npy").write_bytes(b"x")
    item, = read_source(folder, codes=True)
    assert decode((item, SIDE, N_CODES)).startswith("no .npy of numbers (")

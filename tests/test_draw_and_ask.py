"""python -m unimod_mini.generate, and the pictures that it draws with."""
from pathlib import Path
from random import Random

import pytest
import torch

from unimod_mini import (VQ, ByteText, Palette, Plan, Tokenizer, UnifiedTransformer, WordText,
                         World, draw_and_ask, load_checkpoint, save_checkpoint)
from unimod_mini.config import ModelConfig
from unimod_mini.draw_and_ask import kept_tokens, main, parser
from unimod_mini.generate import generate_codes, generate_image
from unimod_mini.pictures import enlarged, read_image, write_png
from unimod_mini.shapes import Thing

pytest.importorskip("PIL", reason="PNG files need the optional pillow")
PLAN = Plan({"t2i": (1, .5, 0, .7), "mmu": (.4, 1, .5, 0)})


@pytest.fixture(params=("showo", "emu3"))
def checkpoint(request, tmp_path):
    """A checkpoint of a small random model whose pictures have 2 x 3 patches of 2 x 2 pixels."""
    backbone = request.param
    torch.manual_seed(0)
    patches = torch.randint(256, (6, 2, 2, 3), dtype=torch.uint8)
    text = WordText("two red rings describe ? USER: ASSISTANT: 2*3".split())
    tokenizer = Tokenizer(backbone, text, Palette(patches), (2, 3), 8, "USER:", "ASSISTANT:")
    heads = 2 if backbone == "showo" else 1
    config = ModelConfig(backbone, 4, 2, heads, 16, 32, tokenizer.vocab_size, 64,
                         tokenizer.image_start)
    model = UnifiedTransformer(config, PLAN)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.4)
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, model, tokenizer=tokenizer.state(),
                    drawing={"temperature": 1.0, "guidance": 0.0, "steps": 3})
    return path


def stored_tokenizer(checkpoint):
    return Tokenizer.from_state(load_checkpoint(checkpoint)[1]["tokenizer"])


def test_the_flags_are_frozen():
    """The command line of generate: names and defaults."""
    flags = {a.option_strings[0]: a.default for a in parser()._actions}
    del flags["-h"]
    assert flags == {
        "--checkpoint": "out/toy/checkpoint.pt", "--prompt": None, "--image": None,
        "--question": None, "--explain": False, "--routing": "causal", "--temperature": None,
        "--guidance": None, "--steps": None, "--top-k": None, "--top-p": None, "--seed": 0,
        "--device": None, "--precision": "auto", "--out": None}


def test_steps_are_for_parallel_drawing(checkpoint, tmp_path):
    """--steps on a model that draws token by token is refused, not ignored."""
    call = ["--checkpoint", str(checkpoint), "--prompt", "two red rings", "--steps", "2",
            "--out", str(tmp_path / "a.png")]
    if load_checkpoint(checkpoint)[0].config.backbone == "showo":
        return main(call)
    with pytest.raises(SystemExit, match="--steps 2: .*checkpoint.pt draws token by token"):
        main(call)


def test_draw_then_ask(checkpoint, tmp_path, capsys):
    """--prompt draws generate_image's picture as a PNG that reads back pixel by pixel, the same for
    the same seed; --explain writes what each layer kept under the rule that was asked for; nothing
    else is left behind."""
    drawn, common = tmp_path / "a.png", ["--checkpoint", str(checkpoint), "--device", "cpu"]
    main([*common, "--prompt", "two red rings", "--out", str(drawn), "--explain"])
    out = capsys.readouterr().out
    for text in ("layer 1, causal:", "a.png written", "a-kept.png written"):
        assert text in out
    assert "\x1b[" not in out
    first, (model, stored) = drawn.read_bytes(), load_checkpoint(checkpoint)
    tokenizer = stored_tokenizer(checkpoint)
    image = generate_image(model, tokenizer, "two red rings", **stored["drawing"])
    assert torch.equal(read_image(drawn, (4, 6)), image)
    main([*common, "--prompt", "two red rings", "--out", str(drawn)])
    assert drawn.read_bytes() == first
    asking = [*common, "--image", str(drawn), "--explain", "--out", str(tmp_path / "b.png")]
    main([*asking, "--question", "describe ?"])
    out = capsys.readouterr().out
    for text in ("describe ?", "layer 0, causal:", "layer 2, causal:"):
        assert text in out
    assert "layer 1" not in out
    main([*asking, "--question", "two", "--routing", "topk"])
    assert "layer 0, topk:" in capsys.readouterr().out
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {"checkpoint.pt", "a.png", "a-kept.png", "b-kept.png"}


@pytest.mark.parametrize("arguments, message", [
    (["--prompt", "two red wings"], "unknown word 'wings': .* did you mean 'rings'?"),
    (["--prompt", "red " * 9], "over the budget of 8"),
    (["--prompt", "red", "--checkpoint", "missing.pt"],
     "missing.pt does not exist: python train_toy.py makes one"),
    (["--prompt", "red", "--checkpoint", "foreign.pt"], "foreign.pt is not a checkpoint"),
    (["--prompt", "red", "--checkpoint", "bare.pt"], "bare.pt holds no tokenizer"),
    (["--prompt", "red", "--device", "toaster"], "no device 'toaster' here: choose from"),
    (["--prompt", "red", "--device", "cpu:x"], "no device 'cpu:x' here: choose from"),
    (["--prompt", "red", "--out", "."], "--out .: pictures are written as PNG, give a name"),
    (["--prompt", "  "], "an empty --prompt or --question: say what to draw, or what to answer"),
    (["--image", "small.png", "--question", ""], "an empty --prompt or --question"),
    (["--prompt", "red", "--out", "a.jpg"], "--out a.jpg: pictures are written as PNG"),
    (["--prompt", "red", "--temperature", "-1"], "temperature must be finite and >= 0"),
    (["--prompt", "red", "--temperature", "nan"], "temperature must be finite and >= 0"),
    (["--image", "foreign.pt", "--question", "describe ?"], "foreign.pt: cannot be read"),
    (["--image", "missing.png", "--question", "describe ?"], "missing.png does not exist"),
])
def test_errors_in_one_line(checkpoint, tmp_path, monkeypatch, arguments, message):
    """What cannot be done ends the program with one line that says why, and writes nothing."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "foreign.pt").write_text("{}")
    model, _ = load_checkpoint(checkpoint)
    save_checkpoint(tmp_path / "bare.pt", model)
    write_png(torch.zeros(4, 5, 3, dtype=torch.uint8), tmp_path / "small.png")
    before = set(tmp_path.iterdir())
    with pytest.raises(SystemExit, match=message):
        main(["--checkpoint", str(checkpoint), *arguments])
    assert set(tmp_path.iterdir()) == before


IMAGE = ["--image", "a", "--question", "b"]


@pytest.mark.parametrize("arguments, message", [
    ([], "give either --prompt, or --image with --question"),
    (["--prompt", "a", "--image", "b.png"], "give either --prompt, or --image with --question"),
    (["--image", "b.png"], "give either --prompt, or --image with --question"),
    (["--prompt", "a", "--question", "c"], "give either --prompt, or --image with --question"),
    (["--prompt", "a", "--top-p", ".3"], "--top-p: not for pictures"),
    ([*IMAGE, "--steps", "3"], "--steps: not for answers"),
    ([*IMAGE, "--guidance", "3"], "--guidance: not for answers"),
    (["--prompt", "a", "--top-k", "3", "--temperature", "0"], "give a --temperature above 0"),
    ([*IMAGE, "--top-k", "3"], "give a --temperature above 0"),
    ([*IMAGE, "--top-p", ".5", "--temperature", "0"], "give a --temperature above 0")])
def test_options_that_do_not_go_together(checkpoint, arguments, message, capsys):
    """Either a prompt, or a picture with a question; no option that would not be read."""
    with pytest.raises(SystemExit):
        main(["--checkpoint", str(checkpoint), *arguments])
    assert message in capsys.readouterr().err


def test_kept_tokens(checkpoint):
    """One picture for each routed layer, with skipped patches faded; kept words in brackets."""
    model, _ = load_checkpoint(checkpoint)
    tokenizer = stored_tokenizer(checkpoint)
    codes = torch.tensor([[[0, 1, 2], [3, 4, 5]]])
    batch, image = tokenizer.t2i(["two red rings"], codes), tokenizer.image.decode(codes)[0]
    ids = batch.ids[0]
    for layer in (1, 3):                   # a threshold that drops one word and keeps the others
        routing = model.eval()(**batch.inputs(), task="t2i", routing="causal").routing[layer]
        words = routing.predictor[0][ids < 3].detach().sort().values
        model.router(layer, "t2i").threshold_t2i.copy_(words[:2].mean())
    pictures, labels, texts = kept_tokens(model, tokenizer, batch, "t2i")
    routing = model(**batch.inputs(), task="t2i", routing="causal").routing
    names = [label.split(":")[0] for label in labels]
    assert len(pictures) == 2 and names == ["layer 1, causal", "layer 3, causal"]
    is_code = (ids >= tokenizer.image_start) & (ids < tokenizer.image_end)
    for picture, label, text, layer in zip(pictures, labels, texts, (1, 3)):
        selected = routing[layer].selected[0]
        assert f"{int(selected[is_code].sum())} of 6 patches" in label
        same = (picture == image).all(-1).view(2, 2, 3, 2).transpose(1, 2)      # (h, w, p, p)
        assert same.flatten(2).all(-1).flatten().tolist() == selected[is_code].tolist()
        words, kept = [], set()
        for i, on in zip(ids.tolist(), selected.tolist()):
            if i < tokenizer.text.size:
                words.append(f"[{tokenizer.name(i)}]" if on else tokenizer.name(i))
                kept |= {on} if tokenizer.name(i) != "2*3" else set()
        assert text == " ".join(words) and kept == {True, False}


@pytest.mark.parametrize("size, mode", [((6, 4), "RGB"), ((12, 12), "L"), ((640, 480), "RGB"),
                                        ((30, 90), "RGBA"), ((1, 1), "P")])
def test_any_picture_is_asked_about(checkpoint, tmp_path, monkeypatch, size, mode):
    """Any size and mode: the codes of the picture as read_image reads it, as for prepare."""
    from PIL import Image
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (*size[::-1], 4), generator=generator, dtype=torch.uint8)
    Image.fromarray(pixels.numpy(), "RGBA").convert(mode).save(tmp_path / "p.png")
    asked = []

    def answer(model, tokenizer, codes, *_, **__):
        asked.append(codes)
        return ["two"]

    monkeypatch.setattr(draw_and_ask, "generate_text", answer)
    main(["--checkpoint", str(checkpoint), "--image", str(tmp_path / "p.png"),
          "--question", "two"])
    picture = read_image(tmp_path / "p.png", (4, 6))
    assert torch.equal(asked[0], stored_tokenizer(checkpoint).image.encode(picture[None]))


def test_several_prompts_and_questions(checkpoint, tmp_path, capsys):
    """Each prompt is drawn as it would be alone, into a numbered file in a new folder; each
    question is answered once."""
    one, common = tmp_path / "one.png", ["--checkpoint", str(checkpoint), "--device", "cpu"]
    new = tmp_path / "new"
    main([*common, "--prompt", "two red rings", "--prompt", "red", "--explain",
          "--out", str(new / "x.png")])
    names = {"x-1.png", "x-1-kept.png", "x-2.png", "x-2-kept.png"}
    assert {p.name for p in new.iterdir()} == names
    main([*common, "--prompt", "red", "--out", str(one)])
    assert one.read_bytes() == (new / "x-2.png").read_bytes()
    capsys.readouterr()
    main([*common, "--image", str(one), "--question", "two", "--question", "describe ?"])
    firsts = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line]
    assert [word for word in firsts if word in ("two", "describe")] == ["two", "describe"]


def test_the_usual_checkpoint_and_the_usual_files(checkpoint, tmp_path, monkeypatch):
    """Without --checkpoint and --out: out/toy/checkpoint.pt, drawn.png; what is explained of a
    question has a file of its own."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="out/toy/checkpoint.pt does not exist: python train_toy"):
        main(["--prompt", "red"])
    (tmp_path / "out" / "toy").mkdir(parents=True)
    checkpoint.rename(tmp_path / "out" / "toy" / "checkpoint.pt")
    main(["--prompt", "red", "--explain"])
    drawn = (tmp_path / "drawn-kept.png").read_bytes()
    main(["--image", "drawn.png", "--question", "two", "--explain"])
    left = {p.name for p in tmp_path.glob("*.png")}
    assert left == {"drawn.png", "drawn-kept.png", "asked-kept.png"}
    assert (tmp_path / "drawn-kept.png").read_bytes() == drawn
    ignored = (Path(draw_and_ask.__file__).parents[1] / ".gitignore").read_text().split()
    assert {"drawn*", "asked*"} <= set(ignored)


# --- The toy world ---

@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A checkpoint of the toy world whose model draws a green ring top-left, and says "one"."""
    world, prompts = World(), []
    text = WordText([*world.words, "USER:", "ASSISTANT:", "4*4"])
    tokenizer = Tokenizer("emu3", text, Palette(world.patches), world.grid,
                          world.longest_text + 2, "USER:", "ASSISTANT:")
    model = UnifiedTransformer(ModelConfig("emu3", 1, 2, 1, 16, 16, **tokenizer.sizes()))
    save_checkpoint(tmp_path / "toy.pt", model, tokenizer=tokenizer.state(), world=world)
    ring = world.draw([[Thing("green", "ring", "top-left")]], Random(0))

    def draw(model, tokenizer, texts, **options):
        prompts.append(texts[0])
        return ring

    def answer(model, tokenizer, codes, texts, **options):
        prompts.append(texts[0])
        return ["one"]

    monkeypatch.setattr(draw_and_ask, "generate_codes", draw)
    monkeypatch.setattr(draw_and_ask, "generate_text", answer)
    write_png(enlarged(tokenizer.image.decode(ring)[0]), tmp_path / "ring.png")
    return ["--checkpoint", str(tmp_path / "toy.pt")], tmp_path, prompts


UNSEEN = "no training picture shows a red ring (held out)"


@pytest.mark.parametrize("prompt, given, verdict", [
    ("A green Ring.", "a green ring", "(right)"), ("a ring top left", "a ring top-left", "(right)"),
    ("a green ring, a red disc", "a green ring and a red disc",
     "(wrong, it shows a green ring top-left)"),
    ("two red rings", "two red rings", f"(wrong, it shows a green ring top-left; {UNSEEN})")])
def test_drawings_of_the_toy_are_judged(toy, capsys, prompt, given, verdict):
    """As people write it; right or wrong by the exact checker; held-out pairs are named."""
    arguments, folder, prompts = toy
    main([*arguments, "--prompt", prompt, "--out", str(folder / "a.png")])
    assert prompts == [given]
    assert f"a.png written: {given}  {verdict}\n" in capsys.readouterr().out


@pytest.mark.parametrize("question, given, verdict", [
    ("How many rings?", "how many rings ?", "(right)"),
    ("how many discs ?", "how many discs ?", "(wrong, right is: zero)"),
    ("is there a red ring?", "is there a red ring ?", f"(wrong, right is: no; {UNSEEN})"),
    ("what color is the disc?", "what color is the disc ?", "")])
def test_answers_of_the_toy_are_judged(toy, capsys, question, given, verdict):
    """The one right answer is known from the picture; where there is none, nothing is said."""
    arguments, folder, prompts = toy
    main([*arguments, "--image", str(folder / "ring.png"), "--question", question])
    assert prompts == [given]
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert f"{given} one  {verdict}".strip() in lines


def test_words_that_the_toy_does_not_know(toy):
    """The error lists the words that fit in that place; marks alone get an example to try."""
    arguments, folder, prompts = toy
    message = "unknown word 'crimson' behind 'a': write one of the colors red, .*; shapes ring,"
    with pytest.raises(SystemExit, match=message):
        main([*arguments, "--prompt", "a crimson ring", "--out", str(folder / "a.png")])
    with pytest.raises(SystemExit, match="an empty text: write 'a "):
        main([*arguments, "--prompt", " ?"])
    assert not prompts and not (folder / "a.png").exists()


def test_an_explained_answer_of_the_toy(toy):
    """--explain of a question writes what its layers kept (here nothing is routed), and nothing
    over a drawing."""
    arguments, folder, _ = toy
    before = {p: p.read_bytes() for p in folder.iterdir()}
    ring = str(folder / "ring.png")
    main([*arguments, "--image", ring, "--question", "describe ?", "--explain", "--out", ring])
    assert {p: p.read_bytes() for p in folder.iterdir()} == before


def test_explained_are_the_codes_that_were_drawn(tmp_path, monkeypatch):
    """With a VQ, which may code its own picture otherwise."""
    torch.manual_seed(0)
    tokenizer = Tokenizer("showo", WordText(["red"]), VQ(32, 2, width=4).eval(), (2, 3), 8)
    config = ModelConfig("showo", 2, 2, 2, 16, 32, **tokenizer.sizes())
    model, seen, drawn = UnifiedTransformer(config, Plan({"t2i": (.5, 1)})), [], []
    save_checkpoint(tmp_path / "a.pt", model, tokenizer=tokenizer.state(), drawing={"steps": 2})

    def explain(model, tokenizer, batch, *_):
        seen.append(tokenizer.codes(batch.ids[:, -7:-1]))

    def draw(*given, **options):
        drawn.append(generate_codes(*given, **options))
        return drawn[0]

    monkeypatch.setattr(draw_and_ask, "explain", explain)
    monkeypatch.setattr(draw_and_ask, "generate_codes", draw)
    main(["--checkpoint", str(tmp_path / "a.pt"), "--prompt", "red", "--explain",
          "--out", str(tmp_path / "a.png")])
    vq = tokenizer.image
    assert torch.equal(seen[0], drawn[0])
    assert not torch.equal(vq.encode(vq.decode(drawn[0])), drawn[0])


def test_an_answer_up_to_the_end_is_explained(tmp_path, monkeypatch, capsys):
    """An answer that fills max_length, whose last token was never fed back."""
    torch.manual_seed(0)
    palette = Palette(torch.randint(256, (6, 2, 2, 3), dtype=torch.uint8))
    tokenizer = Tokenizer("showo", ByteText(), palette, (2, 3), 30)
    config = ModelConfig("showo", 2, 2, 2, 16, 32, tokenizer.vocab_size, 20, tokenizer.image_start)
    model = UnifiedTransformer(config, Plan({"mmu": (.5, 1)}))
    save_checkpoint(tmp_path / "a.pt", model, tokenizer=tokenizer.state())
    monkeypatch.setattr(draw_and_ask, "generate_text", lambda *_, **__: ["\ufffd" * 9])
    write_png(torch.zeros(4, 6, 3, dtype=torch.uint8), tmp_path / "a.png")
    main(["--checkpoint", str(tmp_path / "a.pt"), "--image", str(tmp_path / "a.png"),
          "--question", "what", "--explain", "--out", str(tmp_path / "b.png")])
    assert "layer 0, causal" in capsys.readouterr().out


@pytest.mark.parametrize("factor", (1, 2, 3, 16))
def test_a_drawing_comes_back_pixel_by_pixel(tmp_path, factor):
    """From a file of its own size, or enlarged as generate writes it."""
    image = torch.randint(256, (4, 6, 3), dtype=torch.uint8)
    write_png(image.repeat_interleave(factor, 0).repeat_interleave(factor, 1), tmp_path / "a.png")
    assert torch.equal(read_image(tmp_path / "a.png", (4, 6)), image)
    assert enlarged(image, 96).shape == (96, 144, 3) and enlarged(image, 1).shape == (4, 6, 3)

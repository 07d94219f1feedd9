"""python -m unimod_mini.generate, and the pictures of show.py that it draws with."""
import pytest
import torch

from unimod_mini import (VQ, ByteText, Palette, Plan, Tokenizer, UnifiedTransformer, WordText, generate, load_checkpoint,
                         save_checkpoint)
from unimod_mini.config import ModelConfig
from unimod_mini.data import read_image
from unimod_mini.generate import generate_codes, generate_image, main, parser
from unimod_mini.show import enlarged, kept_tokens, read_png, write_png

pytest.importorskip("PIL", reason="PNG files need the optional pillow")
PLAN = Plan({"t2i": (1, .5, 0, .7), "mmu": (.4, 1, .5, 0)})


@pytest.fixture(params=("showo", "emu3"))
def checkpoint(request, tmp_path):
    """A checkpoint of a small random model whose pictures have 2 x 3 patches of 2 x 2 pixels."""
    torch.manual_seed(0)
    patches = torch.randint(256, (6, 2, 2, 3), dtype=torch.uint8)
    words = "two red rings describe ? USER: ASSISTANT: 2*3".split()
    tokenizer = Tokenizer(request.param, WordText(words), Palette(patches), (2, 3), 8, "USER:", "ASSISTANT:")
    heads = 2 if request.param == "showo" else 1
    config = ModelConfig(request.param, 4, 2, heads, 16, 32, tokenizer.vocab_size, 64, tokenizer.image_start)
    model = UnifiedTransformer(config, PLAN)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.4)
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, model, tokenizer=tokenizer.state(), drawing={"temperature": 1.0, "guidance": 0.0, "steps": 3})
    return path


def test_the_flags_are_frozen():
    """The command line of generate: names and defaults."""
    flags = {a.option_strings[0]: a.default for a in parser()._actions if a.option_strings[0] != "-h"}
    assert flags == {"--checkpoint": None, "--prompt": None, "--image": None, "--question": None, "--explain": False,
                     "--routing": "causal", "--temperature": None, "--guidance": None, "--steps": None, "--top-k": None,
                     "--top-p": None, "--seed": 0, "--device": None, "--out": "drawn.png"}


def test_steps_are_for_parallel_drawing(checkpoint, tmp_path):
    """--steps on a model that draws token by token is refused, not ignored."""
    call = ["--checkpoint", str(checkpoint), "--prompt", "two red rings", "--steps", "2", "--out", str(tmp_path / "a.png")]
    if load_checkpoint(checkpoint)[0].config.backbone == "showo":
        return main(call)
    with pytest.raises(SystemExit, match="--steps 2: .*checkpoint.pt draws token by token, leave it out"):
        main(call)


def test_draw_then_ask(checkpoint, tmp_path, capsys):
    """--prompt draws the picture of generate_image as a PNG that reads back pixel by pixel; --explain writes what each
    layer kept under the rule that was asked for; nothing else is left behind; the same seed draws the same picture."""
    drawn, common = tmp_path / "a.png", ["--checkpoint", str(checkpoint), "--device", "cpu"]
    main([*common, "--prompt", "two red rings", "--out", str(drawn), "--explain"])
    out = capsys.readouterr().out
    assert "\x1b[" in out and "layer 1, causal:" in out and "a.png written" in out and "a-kept.png written" in out
    first, (model, stored) = drawn.read_bytes(), load_checkpoint(checkpoint)
    image = generate_image(model, Tokenizer.from_state(stored["tokenizer"]), "two red rings", **stored["drawing"])
    assert torch.equal(read_png(drawn, 4, 6), image)
    main([*common, "--prompt", "two red rings", "--out", str(drawn)])
    assert drawn.read_bytes() == first
    main([*common, "--image", str(drawn), "--question", "describe ?", "--explain", "--out", str(tmp_path / "b.png")])
    out = capsys.readouterr().out
    assert "describe ?" in out and "layer 0, causal:" in out and "layer 2, causal:" in out and "layer 1" not in out
    main([*common, "--image", str(drawn), "--question", "two", "--explain", "--routing", "topk", "--out", str(tmp_path / "b.png")])
    assert "layer 0, topk:" in capsys.readouterr().out
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint.pt", "a.png", "a-kept.png", "b-kept.png"}


@pytest.mark.parametrize("arguments, message", [
    (["--prompt", "two red wings"], "unknown word 'wings', did you mean 'rings'"),
    (["--prompt", "red " * 9], "over the budget of 8"),
    (["--prompt", "red", "--checkpoint", "missing.pt"], "missing.pt does not exist: python train_toy.py makes one"),
    (["--prompt", "red", "--checkpoint", "foreign.pt"], "foreign.pt is not a checkpoint of unimod_mini"),
    (["--prompt", "red", "--checkpoint", "bare.pt"], "bare.pt holds no tokenizer"),
    (["--prompt", "red", "--device", "toaster"], "no device 'toaster' here: choose from"),
    (["--prompt", "red", "--out", "nowhere/a.png"], "there is no folder nowhere"),
    (["--prompt", "red", "--device", "cpu:x"], "no device 'cpu:x' here: choose from"),
    (["--prompt", "red", "--out", "."], "or it is itself a folder"),
    (["--prompt", "red", "--out", "a.jpg"], "--out a.jpg: pictures are written as PNG"),
    (["--image", "small.png", "--question", "two", "--explain", "--out", "nowhere/a.png"], "there is no folder nowhere"),
    (["--prompt", "red", "--temperature", "-1"], "temperature must be finite and >= 0"),
    (["--prompt", "red", "--temperature", "nan"], "temperature must be finite and >= 0"),
    (["--image", "small.png", "--question", "describe ?"], "small.png has 5x4 pixels, this model sees 6x4"),
    (["--image", "foreign.pt", "--question", "describe ?"], "foreign.pt: cannot be read as a picture"),
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


@pytest.mark.parametrize("arguments", [[], ["--prompt", "a", "--image", "b.png"], ["--image", "b.png"],
                                       ["--prompt", "a", "--question", "c"]])
def test_one_thing_at_a_time(checkpoint, arguments, capsys):
    """Either a prompt, or a picture with a question."""
    with pytest.raises(SystemExit):
        main(["--checkpoint", str(checkpoint), *arguments])
    assert "give either --prompt, or --image with --question" in capsys.readouterr().err


@pytest.mark.parametrize("arguments, message", [(["--prompt", "a", "--top-p", ".3"], "--top-p: not for pictures"),
                                                (["--prompt", "a", "--top-k", "3", "--temperature", "0"], "give a --temperature above 0"),
                                                (["--image", "a", "--question", "b", "--steps", "3"], "--steps: not for answers"),
                                                (["--image", "a", "--question", "b", "--top-k", "3"], "give a --temperature above 0"),
                                                (["--image", "a", "--question", "b", "--top-p", ".5", "--temperature", "0"],
                                                 "give a --temperature above 0")])
def test_options_that_would_not_be_read(checkpoint, arguments, message, capsys):
    """An option of the other task is refused, and one of chance where there is none."""
    with pytest.raises(SystemExit):
        main(["--checkpoint", str(checkpoint), *arguments])
    assert message in capsys.readouterr().err


def test_kept_tokens(checkpoint):
    """One picture for each routed layer: kept patches as they are, skipped ones faded; kept words in brackets."""
    model, stored = load_checkpoint(checkpoint)
    tokenizer = Tokenizer.from_state(stored["tokenizer"])
    codes = torch.tensor([[[0, 1, 2], [3, 4, 5]]])
    batch, image = tokenizer.t2i(["two red rings"], codes), tokenizer.image.decode(codes)[0]
    ids = batch.ids[0]
    for layer in (1, 3):                                   # a threshold that drops one word and keeps the others
        routing = model.eval()(**batch.inputs(), task="t2i", routing="causal").routing[layer]
        words = routing.predictor[0][ids < 3].detach().sort().values
        model.router(layer, "t2i").threshold_t2i.copy_(words[:2].mean())
    pictures, labels, texts = kept_tokens(model, tokenizer, batch, "t2i")
    routing = model(**batch.inputs(), task="t2i", routing="causal").routing
    assert len(pictures) == 2 and [label.split(":")[0] for label in labels] == ["layer 1, causal", "layer 3, causal"]
    for picture, label, text, decision in zip(pictures, labels, texts, (routing[1], routing[3])):
        kept = decision.selected[0][(ids >= tokenizer.image_start) & (ids < tokenizer.image_end)]
        assert f"{int(kept.sum())} of 6 patches" in label
        same = (picture == image).all(-1).view(2, 2, 3, 2).transpose(1, 2).flatten(2).all(-1).flatten()
        assert same.tolist() == kept.tolist()
        words = [(tokenizer.name(i), on) for i, on in zip(ids.tolist(), decision.selected[0].tolist()) if i < tokenizer.text.size]
        assert text == " ".join(f"[{word}]" if on else word for word, on in words)
        assert {on for word, on in words if word != "2*3"} == {True, False}


def test_a_picture_is_read_as_training_read_it(tmp_path):
    """Transparent pixels are white, a photograph stands upright, 16 bits are refused: generate --image as data.read_image."""
    from PIL import Image
    clear = Image.new("RGBA", (6, 6), (200, 0, 0, 0))
    clear.paste((0, 0, 250, 255), (0, 0, 3, 6))
    clear.save(tmp_path / "clear.png")
    turned = Image.new("RGB", (6, 6), "red")
    turned.paste((0, 0, 250), (0, 0, 6, 2))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    for name in ("clear.png", "turned.png"):
        assert torch.equal(read_png(tmp_path / name, 6, 6), read_image(tmp_path / name, 6))
    Image.new("I;16", (6, 6), 30000).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match="deep.png: cannot be read as a picture .mode I;16; save it with 8 bits"):
        read_png(tmp_path / "deep.png", 6, 6)


def test_explained_are_the_codes_that_were_drawn(tmp_path, monkeypatch):
    """With a VQ, which may code its own picture otherwise."""
    torch.manual_seed(0)
    tokenizer = Tokenizer("showo", WordText(["red"]), VQ(32, 2, width=4).eval(), (2, 3), 8)
    config = ModelConfig("showo", 2, 2, 2, 16, 32, tokenizer.vocab_size, 64, tokenizer.image_start)
    model, seen, drawn = UnifiedTransformer(config, Plan({"t2i": (.5, 1)})), [], []
    save_checkpoint(tmp_path / "a.pt", model, tokenizer=tokenizer.state(), drawing={"steps": 2})
    monkeypatch.setattr(generate, "explain", lambda model, tokenizer, batch, *_: seen.append(tokenizer.codes(batch.ids[:, -7:-1])))
    monkeypatch.setattr(generate, "generate_codes", lambda *given, **options: drawn.append(generate_codes(*given, **options)) or drawn[0])
    main(["--checkpoint", str(tmp_path / "a.pt"), "--prompt", "red", "--explain", "--out", str(tmp_path / "a.png")])
    vq = tokenizer.image
    assert torch.equal(seen[0], drawn[0]) and not torch.equal(vq.encode(vq.decode(drawn[0])), drawn[0])


def test_an_answer_up_to_the_end_is_explained(tmp_path, monkeypatch, capsys):
    """An answer that fills max_length, whose last token was never fed back."""
    torch.manual_seed(0)
    palette = Palette(torch.randint(256, (6, 2, 2, 3), dtype=torch.uint8))
    tokenizer = Tokenizer("showo", ByteText(), palette, (2, 3), 30)
    config = ModelConfig("showo", 2, 2, 2, 16, 32, tokenizer.vocab_size, 20, tokenizer.image_start)
    save_checkpoint(tmp_path / "a.pt", UnifiedTransformer(config, Plan({"mmu": (.5, 1)})), tokenizer=tokenizer.state())
    monkeypatch.setattr(generate, "generate_text", lambda *_, **__: "\ufffd" * 9)
    write_png(torch.zeros(4, 6, 3, dtype=torch.uint8), tmp_path / "a.png")
    main(["--checkpoint", str(tmp_path / "a.pt"), "--image", str(tmp_path / "a.png"), "--question", "what", "--explain",
          "--out", str(tmp_path / "b.png")])
    assert "layer 0, causal" in capsys.readouterr().out


@pytest.mark.parametrize("factor", (1, 2, 3, 16))
def test_png_round_trip(tmp_path, factor):
    """A picture comes back from a file of its own size or of a whole multiple."""
    image = torch.randint(256, (4, 6, 3), dtype=torch.uint8)
    write_png(image.repeat_interleave(factor, 0).repeat_interleave(factor, 1), tmp_path / "a.png")
    assert torch.equal(read_png(tmp_path / "a.png", 4, 6), image)
    assert enlarged(image, 96).shape == (96, 144, 3) and enlarged(image, 1).shape == (4, 6, 3)

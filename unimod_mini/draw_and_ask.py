"""The command `python -m unimod_mini.generate`: draws prompts, answers questions, explains both.

On a checkpoint of the toy world it also says what is right, by the world's exact checker.

Legend: H and W pixels, h and w rows and columns of image codes.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from . import toy_language
from .checkpoint import load_checkpoint
from .console import command
from .device import find_device
from .generate import generate_codes, generate_text, mmu_spans
from .image_codecs import Codes, load_codes
from .pictures import enlarged, read_image, save_png, terminal, write_codes, write_png
from .shapes import World, caption
from .text_codecs import HFText
from .tokenizer import Batch, Tokenizer
from .inference import inference
from .transformer import PRECISIONS

CHECKPOINT = "out/toy/checkpoint.pt"
FADED = 0.2  # contrast to white that is left of a skipped patch


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser("python -m unimod_mini.generate", description=(
        "Draw prompts, or answer questions on a picture. On a checkpoint of the toy world it says "
        "what is right."))
    add = out.add_argument
    add("--checkpoint", default=CHECKPOINT,
        help=f"checkpoint.pt of train_toy.py, or model.pt of train_full.py ({CHECKPOINT})")
    add("--prompt", action="append",
        help="draw this, in the terminal and as a PNG (codes: an .npy); may be given several times")
    add("--image", help="a picture file (codes: an .npy) to answer --question on")
    add("--question", action="append",
        help='such as "what color is the ring ?"; may be given several times')
    add("--explain", action="store_true", help="show which tokens each routed layer kept")
    add("--routing", choices=("causal", "topk"), default="causal",
        help="tokens are kept by the predictors (causal), or by top-k over the whole sequence "
             "(topk, non-causal)")
    add("--temperature", type=float, help="default: the checkpoint's for pictures, 0 for answers")
    add("--guidance", type=float, help="of pictures; default: the checkpoint's")
    add("--steps", type=int, help="of Show-o's parallel drawing; default: the checkpoint's")
    add("--top-k", type=int, help="only the k likeliest words of an answer, or codes of a picture")
    add("--top-p", type=float, help="of answers: only the likeliest words that reach p")
    add("--seed", type=int, default=0, help="another seed draws another picture (0)")
    add("--device", help="cuda, mps or cpu; found by itself when not given")
    add("--precision", choices=("auto", *PRECISIONS), default="auto",
        help="auto: as the model was trained, where the device multiplies it, else float32")
    add("--out", help="the PNG (codes: .npy) of --prompt (drawn.png); --explain writes *-kept.png "
                      "beside it (of a question: asked-kept.png)")
    return out


def main(argv=None) -> None:
    cli = parser()
    with command():
        args = cli.parse_args(argv)
        check_arguments(cli, args)
        try:
            run(args)
        except FileNotFoundError as error:
            hint = ": python train_toy.py makes one" if error.filename == args.checkpoint else ""
            raise ValueError(f"{error.filename} does not exist{hint}") from None


def check_arguments(cli: argparse.ArgumentParser, args) -> None:
    """Ends with the usage if the options do not go together."""
    drawing = args.prompt is not None
    if drawing == (args.image is not None) or (args.image is None) != (args.question is None):
        cli.error("give either --prompt, or --image with --question")
    if drawing and args.top_p is not None:
        cli.error("--top-p: not for pictures")
    for name, value in (("--guidance", args.guidance), ("--steps", args.steps)):
        if not drawing and value is not None:
            cli.error(f"{name}: not for answers")
    random = drawing if args.temperature is None else args.temperature
    if not random and (args.top_k is not None or args.top_p is not None):
        cli.error("--top-k and --top-p choose among random draws: give a --temperature above 0")


def run(args) -> None:
    """Draws or answers as the command line says."""
    out = Path(args.out or ("drawn.png" if args.prompt else "asked.png"))
    model, stored = load_checkpoint(args.checkpoint, find_device(args.device), args.precision)
    if "tokenizer" not in stored:
        raise ValueError(f"{args.checkpoint} holds no tokenizer: save_checkpoint(.., "
                         "tokenizer=tokenizer.state())")
    tokenizer = Tokenizer.from_state(stored["tokenizer"])
    kinds = (".png", ".npy") if isinstance(tokenizer.image, Codes) else (".png",)
    if out.suffix.lower() not in kinds:
        raise ValueError(f"--out {out}: pictures are written as PNG, give a name that ends in .png "
                         "(codes: .npy)")
    if args.steps is not None and tokenizer.backbone != "showo":
        raise ValueError(f"--steps {args.steps}: {args.checkpoint} draws token by token, leave it "
                         "out")
    texts, world = args.prompt or args.question, None
    if not all(text.strip() for text in texts):
        raise ValueError("an empty --prompt or --question: say what to draw, or what to answer")
    if stored.get("world"):
        world = World(**stored["world"])
        texts = [toy_language.tidy(world, text) for text in texts]
    if args.prompt:
        draw(args, model, tokenizer, world, texts, stored.get("drawing", {}), out)
    else:
        ask(args, model, tokenizer, world, texts, out)


def numbered(path: Path, number: int, count: int) -> Path:
    """The path itself for one file; path-1, path-2 .. for several."""
    return path if count == 1 else path.with_stem(f"{path.stem}-{number}")


def draw(args, model, tokenizer, world, prompts: list, drawing: dict, out: Path) -> None:
    """A file for every prompt, all drawn with the same seed. drawing: the checkpoint's options."""
    for name in ("temperature", "guidance", "steps", "top_k"):
        if getattr(args, name) is not None:
            drawing = drawing | {name: getattr(args, name)}
    for number, prompt in enumerate(prompts, start=1):
        path = numbered(out, number, len(prompts))
        codes = generate_codes(model, tokenizer, [prompt], routing=args.routing, seed=args.seed,
                               **drawing)  # (1, h, w)
        if isinstance(tokenizer.image, Codes):
            print(write_codes(codes[0], path.with_suffix(".npy")))
        else:
            image = tokenizer.image.decode(codes)  # (1, H, W, 3)
            write_png(enlarged(image[0]), path)
            print(f"{path} written: {prompt}{verdict(world, codes, prompt)}\n{terminal(image)}")
        if args.explain:
            batch = tokenizer.t2i([prompt], codes)
            explain(model, tokenizer, batch, "t2i", args.routing, path)


def ask(args, model, tokenizer, world, questions: list, out: Path) -> None:
    """Shows the picture, and every question with its answer."""
    if isinstance(tokenizer.image, Codes):
        codes = read_codes(args.image, tokenizer)  # (1, h, w)
    else:
        size = [n * tokenizer.image.patch for n in tokenizer.grid]
        image = read_image(args.image, size)[None]  # (1, H, W, 3)
        codes = tokenizer.image.encode(image)
        print(terminal(image))
    for number, question in enumerate(questions, start=1):
        asked = question
        if isinstance(tokenizer.text, HFText):
            asked, _ = tokenizer.text.chat(question)
        answer, = generate_text(model, tokenizer, codes, [asked], routing=args.routing,
                                temperature=args.temperature or 0.0, seed=args.seed,
                                top_k=args.top_k, top_p=1.0 if args.top_p is None else args.top_p)
        print(f"{question} {answer}{verdict(world, codes, question, answer)}")
        if args.explain:
            row = tokenizer.mmu_prompt(asked, tokenizer.image_ids(codes)[0].tolist())
            row += tokenizer.text.encode(answer)
            ids = torch.tensor([row[:model.config.max_length]])
            spans = mmu_spans(tokenizer, torch.ones_like(ids, dtype=torch.bool))
            path = numbered(out, number, len(questions))
            explain(model, tokenizer, Batch(ids, spans, None, ids), "mmu", args.routing, path)


def verdict(world: World | None, codes: Tensor, text: str, answer: str | None = None) -> str:
    """What the checker says of the drawing `codes` (1, h, w) of a prompt, or of an answer to a
    question on it, such as "  (right)"; "" if it cannot know."""
    if world is None:
        return ""
    said, (things,) = "", world.read(codes)
    if answer is None and (prompt := toy_language.read_prompt(world, text)):
        shown = "no whole objects" if things is None else caption(things)
        said = "right" if world.fits(prompt, things) else f"wrong, it shows {shown}"
    if answer is not None and things is not None:
        right = toy_language.answer(world, text, things)
        if right is not None:
            said = "right" if answer == right else f"wrong, right is: {right}"
    unseen = " or a ".join(" ".join(pair) for pair in toy_language.held_out(world, text))
    if said and unseen:
        said += f"; no training picture shows a {unseen} (held out)"
    return f"  ({said})" if said else ""


def explain(model, tokenizer, batch: Batch, task: str, routing: str, out: Path) -> None:
    """Prints and writes which tokens of the finished sequence each routed layer kept."""
    batch = batch.to(next(model.parameters()).device)
    pictures, labels, texts = kept_tokens(model, tokenizer, batch, task, routing)
    if not len(pictures):
        print(f"no layer of this model routes {task}: its plan keeps every token or skips the "
              "layer")
        return
    for picture, label, text in zip(pictures, labels, texts):
        print(f"{label}; text: {text}\n{terminal(picture[None])}")
    sheet = torch.stack([enlarged(picture) for picture in pictures])
    print(save_png(sheet, labels, out.with_name(f"{out.stem}-kept.png"), scale=1))


@inference
def kept_tokens(model, tokenizer, batch: Batch, task: str, routing: str = "causal"):
    """What each of L routed layers kept of the one sequence in `batch`.

    Returns the picture with skipped patches faded, (L, H, W, 3) uint8 (black patches if pictures
    are codes); a label a layer; the text a layer, with kept words in [brackets].
    """
    out = model(**batch.inputs(), task=task, routing=routing)
    ids = batch.ids[0].cpu()
    is_code = (ids >= tokenizer.image_start) & (ids < tokenizer.image_end)
    codes = (ids[is_code] - tokenizer.image_start).view(1, *tokenizer.grid)
    if isinstance(tokenizer.image, Codes):
        image = torch.zeros(*tokenizer.grid, 3, dtype=torch.uint8)
    else:
        image = tokenizer.image.decode(codes)[0].cpu()  # (H, W, 3)
    pictures, labels, texts = [], [], []
    for layer, decision in enumerate(out.routing):
        if decision is None:
            continue
        kept = decision.selected[0].cpu()  # (T,) bool
        patches = kept[is_code].view(tokenizer.grid)
        pictures.append(faded(image, patches))
        counts = f"{int(patches.sum())} of {patches.numel()} patches"
        labels.append(f"layer {layer}, {routing}: {counts}")
        texts.append(bracketed(tokenizer, ids.tolist(), kept.tolist()))
    return torch.stack(pictures) if pictures else image[None][:0], labels, texts


def faded(image: Tensor, kept: Tensor) -> Tensor:
    """image (H, W, 3) with the patches where kept (h, w) is False faded to white."""
    cell = len(image) // len(kept)
    kept = kept.repeat_interleave(cell, 0).repeat_interleave(cell, 1)[..., None]
    light = 255 - FADED * (255 - image.float())
    return torch.where(kept, image.float(), light).to(torch.uint8)


def bracketed(tokenizer, ids: list, kept: list) -> str:
    """The words of a sequence; those that were kept in [brackets]."""
    special, words = set(tokenizer.special.values()), []
    for i, on in zip(ids, kept):
        if i < tokenizer.text.size and i not in special:
            words.append(f"[{tokenizer.name(i)}]" if on else tokenizer.name(i))
    return " ".join(words)


def read_codes(path, tokenizer: Tokenizer) -> Tensor:
    """The .npy of a picture's codes, long (1, h, w). ValueError names the file if it is none."""
    try:
        codes = load_codes(path, tokenizer.grid, tokenizer.image.n_codes)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return torch.from_numpy(codes).long()[None]

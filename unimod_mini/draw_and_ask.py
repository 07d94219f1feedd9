"""The command `python -m unimod_mini.generate`: draws prompts, answers questions on a picture,
explains.

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
from .shapes import World
from .text_codecs import HFText
from .tokenizer import Batch, Tokenizer
from .inference import inference
from .transformer import PRECISIONS

CHECKPOINT = "out/toy/checkpoint.pt"
DIM = 0.2        # what is left of a skipped patch's contrast to white


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser("python -m unimod_mini.generate", description="Draw prompts, or answer questions on "
                                  "a picture. On a checkpoint of the toy world it says what is right.")
    out.add_argument("--checkpoint", default=CHECKPOINT, help="checkpoint.pt of train_toy.py, or model.pt of "
                                                              f"train_full.py ({CHECKPOINT})")
    out.add_argument("--prompt", action="append", help="draw this, in the terminal and as a PNG (codes: as an .npy); "
                                                       "may be given several times")
    out.add_argument("--image", help="a picture file (codes: an .npy) to answer --question on")
    out.add_argument("--question", action="append", help='such as "what color is the ring ?"; may be given several '
                                                         "times")
    out.add_argument("--explain", action="store_true", help="show which tokens each routed layer kept")
    out.add_argument("--routing", choices=("causal", "topk"), default="causal", help="who is kept: by the predictors "
                     "(causal), or by top-k over the whole sequence (topk, non-causal)")
    out.add_argument("--temperature", type=float, help="default: the checkpoint's for pictures, 0 for answers")
    out.add_argument("--guidance", type=float, help="of pictures; default: the checkpoint's")
    out.add_argument("--steps", type=int, help="of Show-o's parallel drawing; default: the checkpoint's")
    out.add_argument("--top-k", type=int, help="only the k likeliest words of an answer, or codes of a picture")
    out.add_argument("--top-p", type=float, help="of answers: only the likeliest words that reach p")
    out.add_argument("--seed", type=int, default=0, help="another seed draws another picture (0)")
    out.add_argument("--device", help="cuda, mps or cpu; found by itself when not given")
    out.add_argument("--precision", choices=("auto", *PRECISIONS), default="auto", help="auto: the one that the "
                     "model was trained in, where the device multiplies it, else float32")
    out.add_argument("--out", help="the PNG (codes: .npy) of --prompt (drawn.png); --explain writes *-kept.png beside "
                                   "it (of a question: asked-kept.png)")
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


def check_arguments(cli, args) -> None:
    """Ends with the usage where the options do not go together."""
    drawing = args.prompt is not None
    if drawing == (args.image is not None) or (args.image is None) != (args.question is None):
        cli.error("give either --prompt, or --image with --question")
    idle = {"--top-p": args.top_p} if drawing else {"--guidance": args.guidance, "--steps": args.steps}
    if unread := [name for name, value in idle.items() if value is not None]:
        cli.error(f"{', '.join(unread)}: not for {'pictures' if drawing else 'answers'}")
    by_chance = args.temperature or (args.temperature is None and drawing)  # the checkpoint's
    if (args.top_k is not None or args.top_p is not None) and not by_chance:
        cli.error("--top-k and --top-p are about what is drawn by chance: give a --temperature above 0 as well")


def run(args) -> None:
    """Draw or answer as the command line says, and show it."""
    out = Path(args.out or ("drawn.png" if args.prompt else "asked.png"))
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder: give the name of a file in it")
    if out.suffix.lower() not in (".png", ".npy"):
        raise ValueError(f"--out {out}: pictures are written as PNG, give a name that ends in .png (codes: .npy)")
    model, stored = load_checkpoint(args.checkpoint, find_device(args.device), args.precision)
    if "tokenizer" not in stored:
        raise ValueError(f"{args.checkpoint} holds no tokenizer: save_checkpoint(.., tokenizer=tokenizer.state())")
    tokenizer = Tokenizer.from_state(stored["tokenizer"])
    codes = isinstance(tokenizer.image, Codes)             # nothing to see
    if args.prompt and not codes and out.suffix.lower() == ".npy":
        raise ValueError(f"--out {out}: this model draws pictures, give a name that ends in .png")
    if args.steps is not None and tokenizer.backbone != "showo":
        raise ValueError(f"--steps {args.steps}: {args.checkpoint} draws token by token, leave it out")
    # of the toy: what is right is known
    world = World(**stored["world"]) if stored.get("world") else None
    texts = [read_text(text, world) for text in args.prompt or args.question]
    if args.prompt:
        draw(args, model, tokenizer, world, texts, stored.get("drawing", {}), out.with_suffix(".npy") if codes else out)
    else:
        ask(args, model, tokenizer, world, texts, out)


def read_text(text: str, world: World | None) -> str:
    """A prompt or a question as it is given to the model. ValueError for an empty one, and for
    words that the toy world does not know.
    """
    if world is not None:
        return toy_language.tidy(world, text)
    if not text.strip():
        raise ValueError("an empty --prompt or --question: say what to draw, or what to answer")
    return text


def numbered(path: Path, number: int, count: int) -> Path:
    """path, or path-1, path-2 .. where there are several."""
    return path if count == 1 else path.with_stem(f"{path.stem}-{number}")


def draw(args, model, tokenizer, world, prompts: list, stored: dict, out: Path) -> None:
    """Every prompt with the same seed: a file each, shown in the terminal.

    stored: the checkpoint's way of drawing.
    """
    given = {"temperature": args.temperature, "guidance": args.guidance, "steps": args.steps, "top_k": args.top_k}
    options = stored | {name: x for name, x in given.items() if x is not None}
    if args.top_k is not None and not options.get("temperature", 1.0):
        raise ValueError("--top-k: this checkpoint draws at temperature 0, give a --temperature above 0 as well")
    for number, prompt in enumerate(prompts, start=1):
        path = numbered(out, number, len(prompts))
        codes = generate_codes(model, tokenizer, [prompt], args.routing, seed=args.seed, **options)
        image = tokenizer.image.decode(codes)[0]
        if path.suffix == ".npy":
            print(write_codes(image, path))
        else:
            write_png(enlarged(image), path)
            print(f"{path} written: {prompt}{judged(world, prompt, codes)}\n{terminal(image[None])}")
        if args.explain:
            explain(model, tokenizer, tokenizer.t2i([prompt], codes), "t2i", args.routing, path)


def ask(args, model, tokenizer, world, questions: list, out: Path) -> None:
    """The picture, and every question with its answer."""
    see = not isinstance(tokenizer.image, Codes)
    size = [n * tokenizer.image.patch for n in tokenizer.grid]
    image = read_image(args.image, size) if see else read_codes(args.image, tokenizer)
    codes = tokenizer.image.encode(image[None])
    if see:
        print(terminal(image[None]))
    for number, question in enumerate(questions, start=1):
        asked = tokenizer.text.chat(question)[0] if isinstance(tokenizer.text, HFText) else question
        answer = generate_text(model, tokenizer, codes, [asked], args.routing, args.temperature or 0.0, seed=args.seed,
                               top_k=args.top_k, top_p=1.0 if args.top_p is None else args.top_p)[0]
        print(f"{question} {answer}{judged(world, question, codes, answer)}")
        if args.explain:
            row = tokenizer.mmu_prompt(asked, tokenizer.image_ids(codes)[0].tolist()) + tokenizer.text.encode(answer)
            ids = torch.tensor([row[:model.config.max_length]])
            batch = Batch(ids, mmu_spans(tokenizer, torch.ones_like(ids) == 1), None, ids)
            explain(model, tokenizer, batch, "mmu", args.routing, numbered(out, number, len(questions)))


def judged(world: World | None, text: str, codes: Tensor, answer: str | None = None) -> str:
    """What the toy world's exact checker says of a drawing (of codes (1, h, w)), or of an answer on
    them; "" where it cannot know.
    """
    if world is None:
        return ""
    things, verdict = world.read(codes)[0], ""
    held_out = [" ".join(pair) for pair in toy_language.held_out(world, text)]
    note = f"; no training picture shows a {' or a '.join(held_out)} (held out)" if held_out else ""
    if answer is None and (prompt := toy_language.read_prompt(world, text)):
        shown = "no whole objects" if things is None else toy_language.caption(things)
        verdict = "right" if world.fits(prompt, things) else f"wrong, it shows {shown}"
    if answer is not None and things is not None and (right := toy_language.answer(world, text, things)):
        verdict = "right" if answer == right else f"wrong, right is: {right}"
    return f"  ({verdict}{note})" if verdict else ""


def explain(model, tokenizer, batch, task: str, routing: str, out: Path) -> None:
    """Prints and writes which tokens of the finished sequence each routed layer kept; skipped
    patches are faded.
    """
    batch = batch.to(next(model.parameters()).device)
    pictures, labels, texts = kept_tokens(model, tokenizer, batch, task, routing)
    if not len(pictures):
        print(f"no layer of this model routes {task}: its plan keeps every token or skips the layer")
        return
    for picture, label, text in zip(pictures, labels, texts):
        print(f"{label}; text: {text}\n{terminal(picture[None])}")
    sheet = torch.stack([enlarged(picture) for picture in pictures])
    print(save_png(sheet, labels, out.with_name(f"{out.stem}-kept.png"), scale=1))


@inference
def kept_tokens(model, tokenizer, batch, task: str, routing: str = "causal") -> tuple[Tensor, list, list]:
    """Which tokens of the one sequence in `batch` each routed layer kept.

    Returns the image with the skipped patches faded, (layers, H, W, 3) uint8; a label a layer; and
    for each layer the text with the kept words in [brackets].
    """
    out = model(**batch.inputs(), task=task, routing=routing)
    ids, pictures, labels, texts, special = batch.ids[0], [], [], [], set(tokenizer.special.values())
    is_code = (ids >= tokenizer.image_start) & (ids < tokenizer.image_end)
    codes = (ids[is_code] - tokenizer.image_start).view(1, *tokenizer.grid).cpu()
    image = tokenizer.image.decode(codes)[0]
    if image.dim() == 2:  # codes, of which nothing can be seen: black patches
        image = torch.zeros(*image.shape, 3, dtype=torch.uint8)
    for layer, decision in enumerate(out.routing):
        if decision is None:
            continue
        kept = decision.selected[0]
        here = kept[is_code].view(tokenizer.grid).cpu()                                     # (h, w)
        cell = image.shape[0] // tokenizer.grid[0]
        here = here.repeat_interleave(cell, 0).repeat_interleave(cell, 1)[..., None]  # (H, W, 1)
        pictures.append(torch.where(here, image.float(), 255 - DIM * (255 - image.float())).to(torch.uint8))
        labels.append(f"layer {layer}, {routing}: {int(kept[is_code].sum())} of {tokenizer.n_image} patches")
        words = [(tokenizer.name(i), on) for i, on in zip(ids.tolist(), kept.tolist())
                 if i < tokenizer.text.size and i not in special]
        texts.append(" ".join(f"[{word}]" if on else word for word, on in words))
    return torch.stack(pictures) if pictures else image[None][:0], labels, texts


def read_codes(path, tokenizer: Tokenizer) -> Tensor:
    """The .npy of a picture's codes, long (h, w). ValueError names the file when it is none."""
    try:
        codes = load_codes(path, tokenizer.grid, tokenizer.image.n_codes)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return torch.from_numpy(codes).long()

"""What models trained on emoji draw and answer, with a classifier trained on the real pictures as
the judge.

    python benchmarks/emoji.py DATA dense=out/dense/model.pt unimod=out/unimod/model.pt [--out
    FOLDER] [--drawn 128]

DATA is what `python -m unimod_mini.prepare emoji DATA` wrote, its work folder included. The judge
is a small convolutional net that names concept, style and group of a picture alone. It sees
training pictures only, so its own accuracy on held-out ones (a style that training never showed of
that concept), real and as the codec draws them, is the most that drawn pictures can be expected to
reach; both are printed above the models'. Every model draws the same prompts, those of training and
held-out ones (style x concept), one sample each, and answers the same held-out questions, beside
the most frequent answer of training to each question text. With causal routing. --out: emoji.json,
and a sheet for each, emoji-train.png and emoji-held.png: real, through the codec, then every
model's.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from unimod_mini import Tokenizer, generate_image, load_checkpoint  # noqa: E402
from unimod_mini.data.work_folder import Chunks  # noqa: E402
from unimod_mini.evaluate import ask_and_judge, by_category, accuracy  # noqa: E402
from unimod_mini.atomic_files import write_json  # noqa: E402
from unimod_mini.shapes import Question, commonest_answers  # noqa: E402
from unimod_mini.data.shards import Shards, tokenizer_hash  # noqa: E402
from unimod_mini.pictures import save_png  # noqa: E402
from unimod_mini.device import find_device  # noqa: E402

CHUNK, SHOWN = 128, 8              # generated at once; columns of a sheet
HEADS = ("concept", "style", "group")


class Picture(NamedTuple):
    """An emoji alone: what its caption says, what it is, and its pixels uint8 (S, S, 3)."""
    caption: str
    concept: str
    style: str
    group: str
    pixels: Tensor


def singles(chunks: Chunks, split: str, kind: str) -> list:
    """The pictures alone of this split and kind."""
    found = []
    for record in chunks.used():
        if record["split"] == split and record["kind"] == kind and not record["key"].startswith("scene/"):
            style, concept, *_ = record["key"].split("/")
            texts = {question: answer for _, question, answer in record["texts"]}
            if "which group ?" in texts:  # a picture that occurs again keeps its first texts
                found.append(Picture(record["texts"][0][1], concept, style, texts["which group ?"],
                                     chunks.picture("pixels", record["picture"])))
    return found


# The judge

class Judge(nn.Module):
    """uint8 (B, S, S, 3) -> logits of each head. names: {head: its classes}."""

    def __init__(self, names: dict, width: int = 24):
        super().__init__()
        self.names, layers, channels = names, [], 3
        for stage in range(4):
            wider = width * 2**stage
            layers += [nn.Conv2d(channels, wider, 3, 1 if stage == 0 else 2, 1), nn.BatchNorm2d(wider), nn.ReLU()]
            channels = wider
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.3))
        self.heads = nn.ModuleDict({head: nn.Linear(4 * channels, len(classes)) for head, classes in names.items()})

    def forward(self, images: Tensor) -> dict:
        features = self.features(images.permute(0, 3, 1, 2).float() / 127.5 - 1)  # (B, 4 C)
        return {head: layer(features) for head, layer in self.heads.items()}

    def targets(self, pictures: list) -> dict:
        return {head: torch.tensor([classes.index(getattr(p, head)) for p in pictures])
                for head, classes in self.names.items()}


def disturb(images: Tensor, rng: torch.Generator) -> Tensor:
    """Moves the pictures by up to 3 pixels on white, blurs half of them, changes their colours:
    (B, S, S, 3).
    """
    n, side = len(images), images.shape[1]
    x = F.pad(images.permute(0, 3, 1, 2).float(), (3, 3, 3, 3), value=255.0)
    y, z = torch.randint(0, 7, (2,), generator=rng).tolist()                 # one move a batch
    x = x[:, :, y:y + side, z:z + side]
    coin, light = torch.rand(n, 1, 1, 1, generator=rng), 0.8 + 0.4 * torch.rand(n, 3, 1, 1, generator=rng)
    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = torch.where(coin.to(x.device) < 0.5, soft, x)
    return (255 - (255 - x) * light.to(x.device)).clamp(0, 255).permute(0, 2, 3, 1)


def train_judge(pictures: list, steps: int, seed: int, device) -> Judge:
    """Every concept equally often, whatever its skin tones and styles."""
    torch.manual_seed(seed)
    names = {head: sorted({getattr(p, head) for p in pictures}) for head in HEADS}
    judge, rng, generator = Judge(names).to(device), Random(seed), torch.Generator().manual_seed(seed)
    by_concept = {}
    for number, picture in enumerate(pictures):
        by_concept.setdefault(picture.concept, []).append(number)
    images, targets = torch.stack([p.pixels for p in pictures]).to(device), judge.targets(pictures)
    concepts = list(by_concept)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    for _ in tqdm(range(steps), "judge", unit="step"):
        pick = torch.tensor([rng.choice(by_concept[concept]) for concept in rng.choices(concepts, k=128)])
        logits = judge(disturb(images[pick.to(device)], generator))
        loss = sum(F.cross_entropy(logits[head], targets[head][pick].to(device), label_smoothing=0.1) for head in HEADS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return judge.eval()


@torch.no_grad()
def verdict(judge: Judge, pictures: list, images: Tensor) -> dict:
    """How often images (B, S, S, 3) show what `pictures` say: concept (first, among five),
    style, both, group.
    """
    known = [i for i, p in enumerate(pictures) if p.concept in judge.names["concept"]]
    pictures, out = [pictures[i] for i in known], {"pictures": len(known)}
    device = next(judge.parameters()).device
    logits, targets = {head: x.cpu() for head, x in judge(images[known].to(device)).items()}, judge.targets(pictures)
    right = {head: logits[head].argmax(1) == wanted for head, wanted in targets.items()}
    right["both"] = right["concept"] & right["style"]
    out |= {name: round(those.float().mean().item(), 4) for name, those in right.items()}
    best = logits["concept"].topk(min(5, len(judge.names["concept"])), 1).indices  # (B, 5)
    out["concept in 5"] = round((best == targets["concept"][:, None]).any(1).float().mean().item(), 4)
    return out


# The models

def draw(model, tokenizer, captions: list, drawing: dict, label: str) -> Tensor:
    """One picture for every caption, uint8 (B, S, S, 3)."""
    parts = range(0, len(captions), CHUNK)
    return torch.cat([generate_image(model, tokenizer, captions[start:start + CHUNK], seed=start, **drawing).cpu()
                      for start in tqdm(parts, f"{label} draws", unit="batch")])


def held_questions(data: Path, shards: Shards, n: int, seed: int) -> tuple[list, Tensor]:
    """At most n held-out questions, their category what holding it out tests: (list of Question,
    codes (n, h, w)).
    """
    with open(data / "held.jsonl", encoding="utf-8") as file:
        rows = [row for row in map(json.loads, file) if row["task"] == "mmu"]
    picks = sorted(Random(f"questions {seed}").sample(range(len(rows)), min(n, len(rows))))
    codes = torch.stack([shards.sample("mmu", i, "held").codes for i in picks])
    return [Question(rows[i]["question"], rows[i]["kind"], rows[i]["answer"]) for i in picks], codes


def blind_answers(chunks: Chunks) -> dict:
    """{question: its most frequent answer in training}."""
    return commonest_answers((question, reply) for record in chunks.used() if record["split"] == "train"
                             for task, question, reply in record["texts"] if task == "mmu")


def by_kind(right: list) -> dict:
    """[(kind, right or wrong)] -> {kind: share that is right}, and of all under "all"."""
    return by_category(right) | {"all": accuracy(right)}


# The command

def sheet(rows: list, captions: list, path) -> str:
    """Pictures (SHOWN, S, S, 3) of each row, one row over the other, a white line between."""
    gap = rows[0].new_full((len(captions), 1, *rows[0].shape[2:]), 255)
    stacked = torch.cat([part for row in rows for part in (row[:len(captions)], gap)], dim=1)
    return save_png(stacked, captions, path, scale=3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data")
    parser.add_argument("models", nargs="+", metavar="NAME=FILE")
    parser.add_argument("--drawn", type=int, default=128, help="prompts of training, and as many held-out ones")
    parser.add_argument("--asked", type=int, default=600, help="held-out questions")
    parser.add_argument("--judge-steps", type=int, default=1500)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest code everywhere")
    parser.add_argument("--guidance", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="out/emoji-judged")
    args = parser.parse_args()
    data, out, device = Path(args.data), Path(args.out), find_device()
    shards, chunks = Shards(data), Chunks(data / "work")
    if not len(chunks):
        parser.error(f"{data}/work is empty: the judge needs the real pictures, prepare the data again")
    models = dict(spec.partition("=")[::2] for spec in args.models)
    if lost := [f"{name}={path}" for name, path in models.items() if not Path(path).is_file()]:
        parser.error(f"{', '.join(lost)}: expected NAME=FILE, a checkpoint that is there")
    tokenizer, rng = shards.tokenizer, Random(f"prompts {args.seed}")
    drawing = {"temperature": args.temperature, "guidance": args.guidance, "steps": 16}
    seen, held = singles(chunks, "train", ""), singles(chunks, "held", "style x concept")
    judge = train_judge(seen, args.judge_steps, args.seed, device)
    prompts = {"train": rng.sample(seen, min(args.drawn, len(seen))), "held": rng.sample(held, min(args.drawn, len(held)))}
    results, rows = {"judge": {}, "drawn": {}, "answered": {}}, {"train": [], "held": []}
    for split, pictures in prompts.items():
        real = torch.stack([p.pixels for p in pictures])
        coded = tokenizer.image.decode(tokenizer.image.encode(real)).cpu()
        results["judge"] |= {f"real {split}": verdict(judge, pictures, real),
                             f"codec {split}": verdict(judge, pictures, coded)}
        rows[split] = [real, coded]
    asked, codes = held_questions(data, shards, args.asked, args.seed)
    blind = blind_answers(chunks)
    results["answered"]["blind"] = by_kind([(q.category, blind.get(q.text) == q.answer) for q in asked])
    for name, path in models.items():
        model, stored = load_checkpoint(path, device)
        if tokenizer_hash(Tokenizer.from_state(stored["tokenizer"])) != shards.tokenizer_hash:
            parser.error(f"{path} was trained with another tokenizer than {data} has")
        for split, pictures in prompts.items():
            rows[split].append(draw(model, tokenizer, [p.caption for p in pictures], drawing, f"{name} {split}"))
        with tqdm(total=len(asked), desc=f"{name} answers", unit="question") as bar:
            results["answered"][name] = by_kind(ask_and_judge(model, tokenizer, asked, codes, bar))
        results["drawn"] |= {f"{name} {split}": verdict(judge, prompts[split], rows[split][-1]) for split in prompts}
    report(results, Counter(q.category for q in asked))
    out.mkdir(parents=True, exist_ok=True)
    for split, pictures in prompts.items():
        print(sheet(rows[split], [p.caption for p in pictures[:SHOWN]], out / f"emoji-{split}.png"))
    write_json(out / "emoji.json", results | {"arguments": vars(args)})


def report(results: dict, kinds: Counter) -> None:
    """Two tables: what the judge sees, what is answered."""
    names = ("pictures", "concept", "concept in 5", "style", "both", "group")
    print(f"\n{'the judge on':<22}" + "".join(f"{name:>14}" for name in names))
    for label, row in (results["judge"] | results["drawn"]).items():
        print(f"{label:<22}" + "".join(f"{row[n]:>14}" if n == "pictures" else f"{row[n]:>14.1%}" for n in names))
    print(f"\n{'held-out questions':<30}{'asked':>7}" + "".join(f"{name:>12}" for name in results["answered"]))
    for kind in (*sorted(kinds), "all"):
        print(f"{kind:<30}{kinds.get(kind, kinds.total()):>7}"
              + "".join(f"{row[kind]:>12.1%}" for row in results["answered"].values()))


if __name__ == "__main__":
    main()

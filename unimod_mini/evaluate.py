"""Free-running accuracy by exact checkers.

A world (shapes.World, data.Pictures) samples prompts and questions and judges what comes back. One
sample a prompt, no retries; answers are greedy and must match to the word.
"""

from random import Random

from torch import Tensor

from .console import progress_bar
from .generate import generate_image, generate_text
from .shapes import blind_answers

CHUNK = 84   # rows generated at once: a multiple of the 7 prompt and the 6 question categories


def draw_and_judge(model, tokenizer, world, prompts, progress=None, **options) -> list:
    """[(category, right or wrong)] of one picture for every prompt."""
    right = []
    for start in range(0, len(prompts), CHUNK):
        part = prompts[start:start + CHUNK]
        images = generate_image(model, tokenizer, [p.text for p in part], seed=start, **options)
        things = world.read(tokenizer.image.encode(images))
        right += [(p.category, world.fits(p, thing)) for p, thing in zip(part, things)]
        if progress is not None:
            progress.update(len(part))
    return right


def ask_and_judge(model, tokenizer, questions, codes: Tensor, progress=None, **options) -> list:
    """[(category, right or wrong)] of one greedy answer to every question on its picture."""
    right = []
    for start in range(0, len(questions), CHUNK):
        part = questions[start:start + CHUNK]
        answers = generate_text(model, tokenizer, codes[start:start + CHUNK], [q.text for q in part], **options)
        right += [(q.category, answer == q.answer) for q, answer in zip(part, answers)]
        if progress is not None:
            progress.update(len(part))
    return right


def share(right: list) -> float:
    return round(sum(ok for _, ok in right) / max(1, len(right)), 4)


def by_category(right: list) -> dict:
    names = dict.fromkeys(category for category, _ in right)
    return {name: share([r for r in right if r[0] == name]) for name in names}


def fresh_scenes(world, n: int, rng: Random, held_out: bool = False) -> tuple:
    """n prompts, n questions and the codes of their pictures, (n, h, w): what a seed asks of
    every model.
    """
    prompts, _ = world.sample_t2i(n, rng, held_out)
    return prompts, *world.sample_mmu(n, rng, held_out)


def evaluate(model, tokenizer, world, routing: str, n: int, seed: int, drawing: dict, label: str = "") -> dict:
    """n freshly drawn scenes of each task, and n / 3 with a held-out colour-shape pair
    (composition: both tasks' mean).

    drawing: temperature and steps for generate_image. The same seed gives the same prompts to every
    model. A small world repeats itself: many captions and pictures occur in training, too
    (benchmarks/quality.py tells them apart).
    """
    rng, few = Random(f"evaluate {seed}"), n // 3 if world.held_out else 0
    with progress_bar(total=2 * (n + few), desc=f"{label:<8}", unit="scene", mininterval=1.0) as progress:
        def both(count: int, held_out: bool) -> tuple[list, list]:
            prompts, questions, codes = fresh_scenes(world, count, rng, held_out)
            return (draw_and_judge(model, tokenizer, world, prompts, progress, routing=routing, **drawing),
                    ask_and_judge(model, tokenizer, questions, codes, progress, routing=routing))

        t2i, mmu = both(n, False)
        composition = both(few, True) if few else None
    result = {"t2i_accuracy": share(t2i), "mmu_accuracy": share(mmu),
              "composition": None if composition is None else share(composition[0] + composition[1]),
              "by_category": {"t2i": by_category(t2i), "mmu": by_category(mmu)}}
    if composition is not None:
        result["by_category"]["composition"] = {"t2i": share(composition[0]), "mmu": share(composition[1])}
    return result


def blind_accuracy(world, n: int, seed: int) -> float:
    """Accuracy of answering every question of `evaluate` with its text's most frequent answer,
    without the picture.
    """
    answers, (_, questions, _) = blind_answers(world), fresh_scenes(world, n, Random(f"evaluate {seed}"))
    return round(sum(answers.get(q.text) == q.answer for q in questions) / n, 4)

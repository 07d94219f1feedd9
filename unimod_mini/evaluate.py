"""Free-running accuracy by exact checkers.

A world (shapes.World, image_folder.Pictures) samples prompts and questions and judges what comes
back. One sample a prompt, no retries; answers are greedy and must match to the word.
"""

from random import Random

from torch import Tensor

from .console import progress_bar
from .generate import generate_codes, generate_text
from .shapes import blind_answers

CHUNK = 84   # rows generated at once: a multiple of the 7 prompt and the 6 question categories


def draw_and_judge(model, tokenizer, world, prompts: list, progress=None, **options) -> list:
    """[(category, right or wrong)] of one drawing for every prompt. options: of generate_codes."""
    right = []
    for start in range(0, len(prompts), CHUNK):
        part = prompts[start:start + CHUNK]
        texts = [prompt.text for prompt in part]
        codes = generate_codes(model, tokenizer, texts, seed=start, **options)
        for prompt, things in zip(part, world.read(codes)):
            right.append((prompt.category, world.fits(prompt, things)))
        if progress is not None:
            progress.update(len(part))
    return right


def ask_and_judge(model, tokenizer, questions: list, codes: Tensor, progress=None,
                  **options) -> list:
    """[(category, right or wrong)] of one greedy answer to every question on its picture."""
    right = []
    for start in range(0, len(questions), CHUNK):
        part = questions[start:start + CHUNK]
        texts = [question.text for question in part]
        answers = generate_text(model, tokenizer, codes[start:start + CHUNK], texts, **options)
        for question, answer in zip(part, answers):
            right.append((question.category, answer == question.answer))
        if progress is not None:
            progress.update(len(part))
    return right


def accuracy(right: list) -> float:
    """Of (category, right or wrong) pairs."""
    return round(sum(ok for _, ok in right) / max(1, len(right)), 4)


def by_category(right: list) -> dict:
    names = dict.fromkeys(category for category, _ in right)
    return {name: accuracy([pair for pair in right if pair[0] == name]) for name in names}


def fresh_scenes(world, n: int, rng: Random, held_out: bool = False) -> tuple:
    """n prompts, n questions and the codes of their pictures (n, h, w)."""
    prompts, _ = world.sample_t2i(n, rng, held_out)
    questions, codes = world.sample_mmu(n, rng, held_out)
    return prompts, questions, codes


def evaluate(model, tokenizer, world, routing: str, n: int, seed: int, drawing: dict,
             label: str = "") -> dict:
    """n fresh scenes of each task, and n / 3 with a held-out colour-shape pair (composition).

    drawing: temperature and steps of generate_codes. The same seed asks the same of every model. A
    small world repeats itself: many captions and pictures occur in training, too
    (benchmarks/quality.py tells them apart).
    """
    rng, few = Random(f"evaluate {seed}"), n // 3 if world.held_out else 0
    progress = progress_bar(total=2 * (n + few), desc=f"{label:<8}", unit="scene", mininterval=1.0)

    def judge(count: int, held_out: bool) -> tuple[list, list]:
        prompts, questions, codes = fresh_scenes(world, count, rng, held_out)
        drawn = draw_and_judge(model, tokenizer, world, prompts, progress, routing=routing,
                               **drawing)
        answered = ask_and_judge(model, tokenizer, questions, codes, progress, routing=routing)
        return drawn, answered

    with progress:
        t2i, mmu = judge(n, False)
        new_pairs = judge(few, True) if few else None
    result = {"t2i_accuracy": accuracy(t2i), "mmu_accuracy": accuracy(mmu), "composition": None,
              "by_category": {"t2i": by_category(t2i), "mmu": by_category(mmu)}}
    if new_pairs is not None:
        drawn, answered = new_pairs
        result["composition"] = accuracy(drawn + answered)
        of_task = {"t2i": accuracy(drawn), "mmu": accuracy(answered)}
        result["by_category"]["composition"] = of_task
    return result


def blind_accuracy(world, n: int, seed: int) -> float:
    """Accuracy of answering `evaluate`'s questions without their pictures.

    Every question gets the most frequent answer to its text.
    """
    answers = blind_answers(world)
    _, questions, _ = fresh_scenes(world, n, Random(f"evaluate {seed}"))
    right = sum(answers.get(question.text) == question.answer for question in questions)
    return round(right / n, 4)

"""One vocabulary for text and images, and the layouts that turn a sample into a sequence.

    showo: | text .. sot eot | [PAD] soi eoi sov eov t2i mmu t2v v2v lvg | image codes | mask |
    emu3:  | text .. | [PAD] BOS EOS boi img EOL EOF eoi | image codes |

A `Tokenizer` is a text codec, an image codec (text_codecs.py, image_codecs.py, vq.py) and a backbone, whose published layouts it follows
(Show-o, arXiv 2408.12528; Emu3, arXiv 2409.18869). Departure from the usual: `labels[i]` is what the logits at i must
predict, already shifted where the objective is next-token and unshifted where it is masked diffusion, so that one
cross-entropy serves both.

Legend: B batch, T tokens, S text budget, N image tokens, h and w rows and columns of image codes.
"""

import operator
from typing import NamedTuple

import torch
from torch import Tensor

from .image_codecs import Codes, Palette, check_codes
from .plan import TASKS
from .text_codecs import ByteText, HFText, WordText, cut
from .vq import VQ

IGNORE = -100
SPECIAL = {"showo": ("[PAD]", "soi", "eoi", "sov", "eov", "t2i", "mmu", "t2v", "v2v", "lvg"),
           "emu3": ("[PAD]", "BOS", "EOS", "boi", "img", "EOL", "EOF", "eoi")}


def check_rows(rows, *texts) -> None:
    """ValueError unless each of texts is a list of str, as long as rows, and not empty."""
    counts = [len(rows), *(-1 if isinstance(text, str) else len(text) for text in texts)]
    if -1 in counts or 0 in counts or len(set(counts)) > 1:
        raise ValueError("pictures, texts and answers must be lists of the same length, of one sample or more, got "
                         + ", ".join(str(n) if n >= 0 else "a str" for n in counts))


class Batch(NamedTuple):
    """A batch of sequences. spans and valid are None where the layout has no span, no padding."""
    ids: Tensor                # (B, T) long
    spans: Tensor | None       # (B, T) long, 0 = causal text, 1 = the image span
    valid: Tensor | None       # (B, T) bool
    labels: Tensor             # (B, T) long, what the logits at i must predict; IGNORE = no loss

    @property
    def is_valid(self) -> Tensor:
        """(B, T) bool: `valid`, all True where there is no padding."""
        return torch.ones_like(self.ids, dtype=torch.bool) if self.valid is None else self.valid

    def inputs(self) -> dict:
        """Keyword arguments of UnifiedTransformer.forward."""
        return {"ids": self.ids, "spans": self.spans, "valid": self.valid}

    def map(self, change) -> "Batch":
        """change(tensor) for every tensor that is there."""
        return Batch(*(None if t is None else change(t) for t in self))

    def to(self, device) -> "Batch":
        return self.map(lambda t: t.to(device, non_blocking=True))


class Tokenizer:
    """Text, special and image ids of one backbone, and its layouts for the tasks t2i, mmu and lm.

    grid: (h, w) image codes a picture; text_length: the text budget S of a sequence (with sot and eot for showo).
    Raises ValueError for text over budget, codes of another grid, an unknown backbone.
    """

    def __init__(self, backbone: str, text, image, grid: tuple, text_length: int,
                 system: str = "You are a helpful assistant. USER: ", assistant: str = ". ASSISTANT:"):
        if backbone not in SPECIAL:
            raise ValueError(f"Tokenizer: backbone must be showo or emu3, got {backbone!r}")
        if getattr(text, "backbone", backbone) != backbone:
            raise ValueError(f"Tokenizer: the text tokenizer is that of {text.backbone}, not of {backbone}")
        try:
            h, w, length = map(operator.index, (*grid, text_length))
        except (TypeError, ValueError):
            h = w = length = 0
        if min(h, w, length) < 1:
            raise ValueError(f"Tokenizer: grid must be (rows, columns) and text_length a length, all whole numbers of at "
                             f"least 1, got {grid}, {text_length}")
        self.backbone, self.text, self.image, self.grid, self.text_length = backbone, text, image, (h, w), length
        self.system, self.assistant = system, assistant
        names = (("sot", "eot") if backbone == "showo" else ()) + SPECIAL[backbone]
        own = getattr(text, "special", {})                                   # the others follow behind the text
        new = [name for name in names if name not in own]
        self.special = own | {name: text.size + i for i, name in enumerate(new)}
        self.image_start = text.size + len(new)
        self.image_end = self.image_start + image.n_codes
        self.mask_id = self.image_end if backbone == "showo" else None
        self.vocab_size = self.image_end + (backbone == "showo")
        self.pad = self.special["[PAD]"]
        self.eot = self.special["eot" if backbone == "showo" else "EOS"]     # ends an answer

    def state(self) -> dict:
        """Plain data and tensors from which `from_state` makes this tokenizer again, for checkpoints and data sets.
        ValueError for codecs of other classes than this package's."""
        text, image = self.text, self.image
        if not isinstance(text, (WordText, ByteText, HFText)) or not isinstance(image, (Palette, VQ, Codes)):
            raise ValueError(f"WordText, ByteText or HFText with Palette, VQ or Codes can be stored, not "
                             f"{type(text).__name__} with {type(image).__name__}: save its weights apart")
        state = {"backbone": self.backbone, "words": getattr(text, "words", None), "grid": list(self.grid),
                 "text_length": self.text_length, "system": self.system, "assistant": self.assistant,
                 "patches": getattr(image, "patches", None), "vq": None}
        if isinstance(text, HFText):
            state["hf"] = text.state()
        if isinstance(image, Codes):
            state["codes"] = image.n_codes
        if isinstance(image, VQ):
            weights = {name: x.detach().cpu().clone() for name, x in image.state_dict().items()}
            state["vq"] = {"config": image.config(), "weights": weights}
        return state

    @classmethod
    def from_state(cls, state: dict) -> "Tokenizer":
        """The tokenizer that `state` describes; the global generator is left as it was."""
        if "hf" in state:
            text = HFText.from_state(state["hf"], state["backbone"])
        else:
            text = ByteText() if state["words"] is None else WordText(state["words"])
        if "codes" in state:
            image = Codes(state["codes"])
        elif stored := state.get("vq"):                                      # absent from older checkpoints
            with torch.random.fork_rng(devices=[]):
                image = VQ(**stored["config"]).eval()
            image.load_state_dict(stored["weights"])
        else:
            image = Palette(state["patches"])
        return cls(state["backbone"], text, image, tuple(state["grid"]), state["text_length"], state["system"],
                   state["assistant"])

    @property
    def n_image(self) -> int:
        return self.grid[0] * self.grid[1]

    def name(self, i: int) -> str:
        """A readable name of one id, for printing sequences."""
        names = {i: name for name, i in self.special.items()} | {self.mask_id: "[MASK]"}
        if i in names:
            return names[i]
        if 0 <= i < self.text.size:
            return self.text.decode([i])
        if self.image_start <= i < self.image_end:
            return f"<{i - self.image_start}>"
        raise ValueError(f"no id {i}: this tokenizer has 0 to {self.vocab_size - 1}")

    @property
    def picture_length(self) -> int:
        """Tokens of a picture with its header and footer; emu3: and an EOL after every row."""
        ends = self.grid[0] if self.backbone == "emu3" else 0
        return len(self.image_header()) + self.n_image + ends + len(self.image_footer())

    # ------------------------------------------------------------------------------- pieces of a sequence

    def image_ids(self, codes: Tensor) -> Tensor:
        """codes (B, h, w) -> ids (B, N), or for emu3 (B, h (w + 1)) with an EOL after every row."""
        if tuple(codes.shape[1:]) != self.grid:
            raise ValueError(f"image codes of {tuple(codes.shape[1:])}, this tokenizer's grid is {self.grid}")
        check_codes(codes, self.image.n_codes)
        ids = codes + self.image_start
        if self.backbone == "emu3":
            ids = torch.cat((ids, ids.new_full((*ids.shape[:2], 1), self.special["EOL"])), dim=2)
        return ids.flatten(1)

    def codes(self, ids: Tensor) -> Tensor:
        """What image_ids wrote -> codes (B, h, w)."""
        h, w = self.grid
        rows = ids.view(ids.shape[0], h, -1)[:, :, :w]                       # emu3: drop the EOL column
        return rows - self.image_start

    def image_header(self) -> list:
        """emu3: boi "h*w" img; showo: soi."""
        if self.backbone == "showo":
            return [self.special["soi"]]
        return [self.special["boi"], *self.text.encode("{}*{}".format(*self.grid)), self.special["img"]]

    def image_footer(self) -> list:
        return [self.special[name] for name in (("eoi",) if self.backbone == "showo" else ("EOF", "eoi"))]

    def check_text(self, task: str, question: str, answer: str = "") -> None:
        """ValueError, quoting the text, when it does not fit into a sequence of this task. t2i, lm: no answer."""
        emu3_mmu = (self.backbone, task) == ("emu3", "mmu")
        asked = self.question_ids(question) if emu3_mmu else self.text.encode(question)
        apart = len(self.text.encode(self.assistant)) if emu3_mmu else 0     # no part of the budget
        ids = (asked + self.text.encode(answer))[apart:]
        self.fit_text(ids, self.room(task), f"{question} {answer}".strip())

    def fit_text(self, ids: list, budget: int, text: str | None = None) -> list:
        """The ids, or a ValueError that quotes the text when they are over the budget."""
        if len(ids) > budget:
            raise ValueError(f"text of {len(ids)} tokens is over the budget of {budget} (text_length="
                             f"{self.text_length}): {cut(text or self.text.decode(ids))!r}")
        return ids

    # ------------------------------------------------------------------------------------------- layouts

    def t2i(self, captions: list, codes: Tensor) -> Batch:
        """Captions and codes (B, h, w) -> the sequences of text-to-image, all of length `length("t2i")`.

        showo: [PAD..] t2i sot text eot soi N codes eoi    labels: the codes, unshifted (objectives masks them)
        emu3:  BOS text boi h*w img row EOL .. EOF eoi EOS [PAD..]    labels: the codes, shifted
        """
        check_rows(codes, captions)
        rows = [self.t2i_prompt(caption) + image + self.image_footer()
                for caption, image in zip(captions, self.image_ids(codes).tolist())]
        if self.backbone == "emu3":
            rows = [row + [self.eot] for row in rows]
        ids, valid = self.pad_rows(rows, self.length("t2i"), left=self.backbone == "showo")
        is_code = (ids >= self.image_start) & (ids < self.image_end)
        if self.backbone == "showo":
            span = torch.zeros_like(ids)
            span[:, -self.n_image - 2:] = 1                                  # soi N codes eoi
            return Batch(ids, span, valid, ids.masked_fill(~is_code, IGNORE))
        return Batch(ids, None, valid, shift(ids.masked_fill(~is_code, IGNORE)))

    def t2i_prompt(self, caption: str) -> list:
        """Everything before the first image code."""
        text = self.text.encode(caption)
        if self.backbone == "showo":
            text = self.fit_text([self.special["sot"], *text, self.eot], self.text_length)
            return [self.special["t2i"], *text, *self.image_header()]
        return [self.special["BOS"], *self.fit_text(text, self.text_length), *self.image_header()]

    def mmu(self, questions: list, answers: list, codes: Tensor) -> Batch:
        """Questions, answers and codes -> sequences of understanding, all of length `length("mmu")`.

        showo: mmu soi N codes eoi sot question answer eot [PAD..]   span: mmu..eoi
        emu3:  BOS system image question assistant answer EOS [PAD..]
        A question and an answer may be lists of the same length, several turns on one picture: question answer eot
        question answer eot .. Labels: the answers and their ends, shifted.
        """
        check_rows(codes, questions, answers)
        rows, answered, overhead = [], [], self.mmu_overhead()
        for question, answer, image in zip(questions, answers, self.image_ids(codes).tolist()):
            pair = ([question], [answer]) if isinstance(question, str) else (question, answer)
            check_rows(pair[0], *pair)
            turns = list(zip(*pair))
            row = self.mmu_prompt(turns[0][0], image)
            labels = [IGNORE] * len(row)
            for number, (q, a) in enumerate(turns):
                ask = [] if number == 0 else self.question_ids(q)
                reply = [*self.text.encode(a), self.eot]
                row, labels = row + ask + reply, labels + [IGNORE] * len(ask) + reply
            said = " ".join(text for turn in turns for text in turn)
            self.fit_text(row[overhead:], self.text_length, said)
            rows.append(row), answered.append(labels)
        length = self.length("mmu")
        ids, valid = self.pad_rows(rows, length)
        labels = torch.tensor([row + [IGNORE] * (length - len(row)) for row in answered])
        span = torch.zeros_like(ids)
        span[:, :self.n_image + 3] = 1                                       # mmu soi N codes eoi
        return Batch(ids, span if self.backbone == "showo" else None, valid, shift(labels))

    def question_ids(self, question: str) -> list:
        """The question up to where its answer begins."""
        if self.backbone == "showo":
            return self.text.encode(question)
        if getattr(self.text, "merges", False):            # across the seam, too
            return self.text.encode(question + self.assistant)
        return self.text.encode(question) + self.text.encode(self.assistant)

    def mmu_prompt(self, question: str, image: list) -> list:
        """Everything before the answer; image: ids of one picture."""
        text, special = self.question_ids(question), self.special
        picture = [*self.image_header(), *image, *self.image_footer()]
        if self.backbone == "showo":
            return [special["mmu"], *picture, special["sot"], *text]
        return [special["BOS"], *self.text.encode(self.system), *picture, *text]

    def mmu_overhead(self) -> int:
        """Tokens of an mmu sequence that are not counted as text budget."""
        around = [] if self.backbone == "showo" else self.text.encode(self.system) + self.text.encode(self.assistant)
        return 1 + self.picture_length + len(around)                         # mmu or BOS in front

    def lm(self, texts: list) -> Batch:
        """Text only. showo: sot text eot [PAD..]; emu3: BOS text EOS [PAD..]. Labels: all of it, shifted."""
        check_rows(texts, texts)
        first = self.special["sot" if self.backbone == "showo" else "BOS"]
        rows = [[first, *self.fit_text(self.text.encode(text), self.length("lm") - 2), self.eot] for text in texts]
        ids, valid = self.pad_rows(rows, self.length("lm"))
        return Batch(ids, None, valid, shift(ids.masked_fill(~valid, IGNORE)))

    def length(self, task: str) -> int:
        """T of a task: S + N + 3 for every task of showo; for emu3 what its layout needs at most. ValueError for an
        unknown task."""
        if task not in TASKS:
            raise ValueError(f"unknown task {task!r}, the tasks are {', '.join(TASKS)}")
        if self.backbone == "showo" or task == "mmu":
            return self.mmu_overhead() + self.text_length
        return self.text_length + 2 + (self.picture_length if task == "t2i" else 0)          # BOS and EOS

    def room(self, task: str) -> int:
        """How many text ids a sample of a task may have, question and answer together."""
        ends = {"t2i": 2, "mmu": 2} if self.backbone == "showo" else {"t2i": 0, "mmu": 1}    # sot, eot; EOS
        return self.length("lm") - 2 if task == "lm" else self.text_length - ends[task]

    def sizes(self) -> dict:
        """The fields of a ModelConfig that follow from this tokenizer; max_length leaves room for longer answers."""
        return {"vocab_size": self.vocab_size, "image_start": self.image_start,
                "max_length": max(map(self.length, ("t2i", "mmu"))) + self.text_length}

    def pad_rows(self, rows: list, length: int, left: bool = False) -> tuple[Tensor, Tensor]:
        """Lists of ids -> ids (B, length) and valid (B, length) bool."""
        padding = [[self.pad] * (length - len(row)) for row in rows]
        ids = torch.tensor([pad + row if left else row + pad for row, pad in zip(rows, padding)])
        counts = torch.tensor([len(row) for row in rows])[:, None]
        index = torch.arange(length)
        return ids, (index >= length - counts) if left else (index < counts)


def shift(ids: Tensor) -> Tensor:
    """labels[i] = ids[i + 1]; nothing follows the last token."""
    return torch.cat((ids[:, 1:], torch.full_like(ids[:, :1], IGNORE)), dim=1)

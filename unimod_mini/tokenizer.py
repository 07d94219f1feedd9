"""One vocabulary for text and images, and the layouts that turn a sample into a sequence.

    showo: | text .. sot eot | [PAD] soi eoi sov eov t2i mmu t2v v2v lvg | image codes | mask |
    emu3:  | text .. | [PAD] BOS EOS boi img EOL EOF eoi | image codes |

A `Tokenizer` is a text codec (text_codecs.py), an image codec (image_codecs.py, vq.py) and a
backbone, whose published layouts it follows (Show-o, arXiv 2408.12528; Emu3, arXiv 2409.18869).
Departure from the usual: `labels[i]` is what the logits at i must predict, already shifted where
the objective is next-token and unshifted where it is masked diffusion, so that one cross-entropy
serves both.

A text is a str, or a tuple of the ids that were made of it: what a data set stores is not decoded
to be encoded again.

Legend: B batch, T tokens, S text budget, N image tokens, h and w rows and columns of image codes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .image_codecs import Codes, Palette, check_codes
from .plan import TASKS
from .text_codecs import ByteText, HFText, WordText, shorten
from .vq import VQ

IGNORE = -100
SPECIAL = {
    "showo": ("[PAD]", "soi", "eoi", "sov", "eov", "t2i", "mmu", "t2v", "v2v", "lvg"),
    "emu3": ("[PAD]", "BOS", "EOS", "boi", "img", "EOL", "EOF", "eoi")}


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
        return Batch(*[None if tensor is None else change(tensor) for tensor in self])

    def to(self, device) -> "Batch":
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))


class Tokenizer:
    """Text, special and image ids of one backbone, and its layouts for the tasks t2i, mmu and lm.

    grid: (h, w) image codes a picture; text_length: the text budget S of a sequence (with sot and
    eot for showo). ValueError for text over budget, codes of another grid, an unknown backbone.
    """

    def __init__(self, backbone: str, text, image, grid: tuple, text_length: int,
                 system: str = "You are a helpful assistant. USER: ",
                 assistant: str = ". ASSISTANT:"):
        if backbone not in SPECIAL:
            raise ValueError(f"Tokenizer: backbone must be showo or emu3, got {backbone!r}")
        if getattr(text, "backbone", backbone) != backbone:
            raise ValueError(f"Tokenizer: the text tokenizer is that of {text.backbone}, not of "
                             f"{backbone}")
        h, w = grid
        if min(h, w, text_length) < 1:
            raise ValueError("Tokenizer: grid must be (rows, columns) and text_length a length, "
                             f"all at least 1, got {grid}, {text_length}")
        self.backbone, self.text, self.image = backbone, text, image
        self.grid, self.text_length = (int(h), int(w)), int(text_length)
        self.system, self.assistant = system, assistant
        names = (("sot", "eot") if backbone == "showo" else ()) + SPECIAL[backbone]
        own = getattr(text, "special", {})                 # the others follow behind the text
        new = [name for name in names if name not in own]
        self.special = own | {name: text.size + i for i, name in enumerate(new)}
        self.image_start = text.size + len(new)
        self.image_end = self.image_start + image.n_codes
        self.mask_id = self.image_end if backbone == "showo" else None
        self.vocab_size = self.image_end + (backbone == "showo")
        self.pad = self.special["[PAD]"]
        self.eot = self.special["eot" if backbone == "showo" else "EOS"]       # ends an answer

    def state(self) -> dict:
        """Plain data and tensors from which `from_state` makes this tokenizer again.

        ValueError for codecs of other classes than this package's.
        """
        return {"backbone": self.backbone, "grid": list(self.grid),
                "text_length": self.text_length, "system": self.system,
                "assistant": self.assistant, **text_state(self.text), **image_state(self.image)}

    @classmethod
    def from_state(cls, state: dict) -> "Tokenizer":
        """The tokenizer that `state` describes."""
        return cls(state["backbone"], text_from_state(state), image_from_state(state),
                   tuple(state["grid"]), state["text_length"], state["system"],
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

    # --- pieces of a sequence ---

    def image_ids(self, codes: Tensor) -> Tensor:
        """codes (B, h, w) -> ids (B, N), or for emu3 (B, h (w + 1)) with an EOL after every row."""
        if tuple(codes.shape[1:]) != self.grid:
            raise ValueError(f"image codes of {tuple(codes.shape[1:])}, this tokenizer's grid is "
                             f"{self.grid}")
        check_codes(codes, self.image.n_codes)
        ids = codes + self.image_start
        if self.backbone == "emu3":
            end = ids.new_full((*ids.shape[:2], 1), self.special["EOL"])
            ids = torch.cat((ids, end), dim=2)
        return ids.flatten(1)

    def codes(self, ids: Tensor) -> Tensor:
        """What image_ids wrote -> codes (B, h, w)."""
        h, w = self.grid
        rows = ids.view(ids.shape[0], h, -1)[:, :, :w]     # emu3: without the EOL column
        return rows - self.image_start

    def image_header(self) -> list:
        """emu3: boi "h*w" img; showo: soi."""
        if self.backbone == "showo":
            return [self.special["soi"]]
        size = self.text.encode("{}*{}".format(*self.grid))
        return [self.special["boi"], *size, self.special["img"]]

    def image_footer(self) -> list:
        names = ("eoi",) if self.backbone == "showo" else ("EOF", "eoi")
        return [self.special[name] for name in names]

    @property
    def picture_length(self) -> int:
        """Tokens of a picture with its header and footer; emu3: and an EOL after every row."""
        ends = self.grid[0] if self.backbone == "emu3" else 0
        return len(self.image_header()) + self.n_image + ends + len(self.image_footer())

    def text_ids(self, text) -> list:
        """The ids of a text, a str or its ids already."""
        return list(text) if isinstance(text, tuple) else self.text.encode(text)

    def question_ids(self, question) -> list:
        """A question up to where its answer begins; a tuple holds these ids already."""
        if isinstance(question, tuple) or self.backbone == "showo":
            return self.text_ids(question)
        if getattr(self.text, "merges", False):            # a token may span the seam
            return self.text.encode(question + self.assistant)
        return self.text.encode(question) + self.text.encode(self.assistant)

    def mmu_prompt(self, question, image: list) -> list:
        """Everything before the answer; image: ids of one picture."""
        text, special = self.question_ids(question), self.special
        picture = [*self.image_header(), *image, *self.image_footer()]
        if self.backbone == "showo":
            return [special["mmu"], *picture, special["sot"], *text]
        return [special["BOS"], *self.text.encode(self.system), *picture, *text]

    def t2i_prompt(self, caption) -> list:
        """Everything before the first image code."""
        text = self.text_ids(caption)
        if self.backbone == "showo":
            text = self.fit_text([self.special["sot"], *text, self.eot], self.text_length)
            return [self.special["t2i"], *text, *self.image_header()]
        text = self.fit_text(text, self.text_length)
        return [self.special["BOS"], *text, *self.image_header()]

    # --- layouts ---

    def t2i(self, captions: list, codes: Tensor) -> Batch:
        """Captions and codes (B, h, w) -> sequences of text-to-image, all of length("t2i").

        showo: [PAD..] t2i sot text eot soi N codes eoi
        emu3:  BOS text boi h*w img row EOL .. EOF eoi EOS [PAD..]
        Labels: the codes, for showo unshifted (objectives masks them), for emu3 shifted.
        """
        check_rows(codes, captions)
        rows = []
        for caption, image in zip(captions, self.image_ids(codes).tolist()):
            end = [self.eot] if self.backbone == "emu3" else []
            rows.append(self.t2i_prompt(caption) + image + self.image_footer() + end)
        showo = self.backbone == "showo"
        ids, valid = self.pad_rows(rows, self.length("t2i"), left=showo)
        is_code = (ids >= self.image_start) & (ids < self.image_end)
        labels = ids.masked_fill(~is_code, IGNORE)
        if not showo:
            return Batch(ids, None, valid, shift(labels))
        span = torch.zeros_like(ids)
        span[:, -self.n_image - 2:] = 1                    # soi N codes eoi
        return Batch(ids, span, valid, labels)

    def mmu(self, questions: list, answers: list, codes: Tensor) -> Batch:
        """Questions, answers and codes -> sequences of understanding, all of length("mmu").

        showo: mmu soi N codes eoi sot question answer eot [PAD..]   span: mmu..eoi
        emu3:  BOS system image question assistant answer EOS [PAD..]
        A question and an answer may be lists of the same length, several turns on one picture:
        question answer eot question answer eot .. Labels: the answers and their ends, shifted.
        """
        check_rows(codes, questions, answers)
        rows, labels, length = [], [], self.length("mmu")
        for question, answer, image in zip(questions, answers, self.image_ids(codes).tolist()):
            if not isinstance(question, list):
                question, answer = [question], [answer]
            check_rows(question, answer)
            row = self.mmu_prompt(question[0], image)
            label = [IGNORE] * len(row)
            for turn, text in enumerate(answer):
                if turn > 0:
                    asked = self.question_ids(question[turn])
                    row, label = row + asked, label + [IGNORE] * len(asked)
                reply = [*self.text_ids(text), self.eot]
                row, label = row + reply, label + reply
            said = [text for turn in zip(question, answer) for text in turn]
            self.fit_text(row[self.mmu_overhead():], self.text_length, said)
            rows.append(row)
            labels.append(label + [IGNORE] * (length - len(label)))
        ids, valid = self.pad_rows(rows, length)
        span = None
        if self.backbone == "showo":
            span = torch.zeros_like(ids)
            span[:, :self.n_image + 3] = 1                 # mmu soi N codes eoi
        return Batch(ids, span, valid, shift(torch.tensor(labels)))

    def lm(self, texts: list) -> Batch:
        """Text only. showo: sot text eot [PAD..]; emu3: BOS text EOS [PAD..]. Labels: all of it."""
        check_rows(texts)
        first = self.special["sot" if self.backbone == "showo" else "BOS"]
        rows = []
        for text in texts:
            rows.append([first, *self.fit_text(self.text_ids(text), self.room("lm")), self.eot])
        ids, valid = self.pad_rows(rows, self.length("lm"))
        return Batch(ids, None, valid, shift(ids.masked_fill(~valid, IGNORE)))

    # --- lengths ---

    def length(self, task: str) -> int:
        """T of a task: S + N + 3 for every task of showo; for emu3 what its layout may need."""
        if task not in TASKS:
            raise ValueError(f"unknown task {task!r}, the tasks are {', '.join(TASKS)}")
        if self.backbone == "showo" or task == "mmu":
            return self.mmu_overhead() + self.text_length
        return self.text_length + 2 + (self.picture_length if task == "t2i" else 0)  # BOS and EOS

    def mmu_overhead(self) -> int:
        """Tokens of an mmu sequence that are not counted as text budget."""
        around = 0
        if self.backbone == "emu3":
            around = len(self.text.encode(self.system)) + self.assistant_length("mmu")
        return 1 + self.picture_length + around            # mmu or BOS in front

    def assistant_length(self, task: str) -> int:
        """Ids between a question and its answer that are not counted as text budget (emu3)."""
        emu3_mmu = self.backbone == "emu3" and task == "mmu"
        return len(self.text.encode(self.assistant)) if emu3_mmu else 0

    def room(self, task: str) -> int:
        """How many text ids a sample of a task may have, question and answer together."""
        if task == "lm":
            return self.length("lm") - 2
        if self.backbone == "showo":
            return self.text_length - 2                    # sot and eot
        return self.text_length - (task == "mmu")          # EOS

    def check_text(self, task: str, question: str, answer: str = "") -> None:
        """ValueError, quoting the text, when it does not fit into a sequence of this task."""
        asked = self.question_ids(question) if task == "mmu" else self.text_ids(question)
        ids = (asked + self.text_ids(answer))[self.assistant_length(task):]
        self.fit_text(ids, self.room(task), [question, answer])

    def fit_text(self, ids: list, budget: int, texts: list | None = None) -> list:
        """The ids, or a ValueError that quotes the texts when they are over the budget."""
        if len(ids) <= budget:
            return ids
        shown = [self.text.decode(text) if isinstance(text, tuple) else text
                 for text in texts or [tuple(ids)]]
        raise ValueError(f"text of {len(ids)} tokens is over the budget of {budget} (text_length="
                         f"{self.text_length}): {shorten(' '.join(shown).strip())!r}")

    def sizes(self) -> dict:
        """The fields of a ModelConfig that follow; max_length leaves room for longer answers."""
        longest = max(self.length("t2i"), self.length("mmu"))
        return {"vocab_size": self.vocab_size, "image_start": self.image_start,
                "max_length": longest + self.text_length}

    def pad_rows(self, rows: list, length: int, left: bool = False) -> tuple[Tensor, Tensor]:
        """Lists of ids -> ids (B, length) and valid (B, length) bool."""
        padded = []
        for row in rows:
            padding = [self.pad] * (length - len(row))
            padded.append(padding + row if left else row + padding)
        counts = torch.tensor([len(row) for row in rows])[:, None]
        index = torch.arange(length)
        valid = index >= length - counts if left else index < counts
        return torch.tensor(padded), valid


def check_rows(rows, *texts) -> None:
    """ValueError unless all are lists of one length, not empty; a str is no list of texts."""
    counts = [-1 if isinstance(row, str) else len(row) for row in (rows, *texts)]
    if -1 in counts or 0 in counts or len(set(counts)) > 1:
        raise ValueError("pictures, texts and answers must be lists of the same length, of one "
                         "sample or more, got "
                         + ", ".join(str(n) if n >= 0 else "a str" for n in counts))


def shift(ids: Tensor) -> Tensor:
    """labels[i] = ids[i + 1]; nothing follows the last token."""
    return torch.cat((ids[:, 1:], torch.full_like(ids[:, :1], IGNORE)), dim=1)


# --- Codecs as plain data, for checkpoints and data sets ---

def text_state(text) -> dict:
    """WordText, ByteText or HFText -> plain data; ValueError for another class."""
    if isinstance(text, HFText):
        return {"words": None, "hf": text.state()}
    if not isinstance(text, (WordText, ByteText)):
        raise ValueError("WordText, ByteText or HFText can be stored, not a "
                         f"{type(text).__name__}: save it apart")
    return {"words": getattr(text, "words", None)}


def text_from_state(state: dict):
    if "hf" in state:
        return HFText.from_state(state["hf"], state["backbone"])
    return ByteText() if state["words"] is None else WordText(state["words"])


def image_state(image) -> dict:
    """Palette, VQ or Codes -> plain data and tensors; ValueError for another class."""
    state = {"patches": None, "vq": None}
    if isinstance(image, Palette):
        return state | {"patches": image.patches}
    if isinstance(image, Codes):
        return state | {"codes": image.n_codes}
    if isinstance(image, VQ):
        weights = {name: x.detach().cpu().clone() for name, x in image.state_dict().items()}
        return state | {"vq": {"config": image.config(), "weights": weights}}
    raise ValueError(f"Palette, VQ or Codes can be stored, not a {type(image).__name__}: save its "
                     "weights apart")


def image_from_state(state: dict):
    """The image codec; the global generator is left as it was."""
    if "codes" in state:
        return Codes(state["codes"])
    if stored := state.get("vq"):                          # absent from older checkpoints
        with torch.random.fork_rng(devices=[]):
            image = VQ(**stored["config"]).eval()
        image.load_state_dict(stored["weights"])
        return image
    return Palette(state["patches"])

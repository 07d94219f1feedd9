"""Answers and pictures from a trained model.

    python -m unimod_mini.generate --prompt "a green ring and a red disc" --explain
    python -m unimod_mini.generate --image drawn.png --question "how many rings ?"

routing="causal": token by token, routed by the predictors, decoded with a key/value cache.
routing="topk":   every step runs top-k again over the whole prefix, with the capacity of the
                  finished sequence where that is known. It looks at the future of every earlier
                  token, cannot be cached, and serves as the non-causal yardstick.
Show-o's pictures are decoded in parallel (MaskGIT, arXiv 2202.04200), Emu3's row by row.

Guidance: the model has also learnt to draw without a caption. Pushing the logits away from that
picture, c + w (c - u), makes the drawing follow its caption more closely.

Legend: B rows, T tokens so far, N image tokens, V vocabulary, h and w rows and columns of codes.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .cache import Cache
from .inference import inference
from .tokenizer import Tokenizer
from .transformer import UnifiedTransformer

CHOICE_NOISE = 4.5   # of draw_parallel
ROUNDING = 1e-6      # of a sum of float32 probabilities: ids that reach top_p exactly end there


def check_model(model: UnifiedTransformer, tokenizer: Tokenizer) -> None:
    """ValueError when the tokenizer's ids are not the model's, and for weights that are not finite.

    Reads every weight once, which costs as much as one more token.
    """
    config, weights = model.config, dict(model.named_parameters())
    finite = torch.stack([weight.isfinite().all() for weight in weights.values()]).tolist()
    if not all(finite):
        wrong = [name for name, is_finite in zip(weights, finite) if not is_finite]
        raise ValueError(f"{len(wrong)} of the model's weights are not finite, {wrong[0]} is the "
                         "first: take a checkpoint from before its training failed")
    ours = config.backbone, config.image_start
    theirs = tokenizer.backbone, tokenizer.image_start
    if theirs != ours or tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"the tokenizer is of another model: {tokenizer.backbone}, image codes "
                         f"from {tokenizer.image_start}, {tokenizer.vocab_size} ids; the model: "
                         f"{config.backbone}, from {config.image_start}, {config.vocab_size}. Use "
                         "the one that the model was trained with")


def check_sampling(routing: str, temperature: float, top_k: int | None = None, top_p: float = 1.0,
                   guidance: float = 0.0) -> None:
    if routing not in ("causal", "topk"):
        raise ValueError(f'routing must be "causal" or "topk" (non-causal), got {routing!r}')
    if not 0 <= guidance < math.inf:
        raise ValueError(f"guidance must be finite and >= 0, got {guidance}")
    is_k = top_k is None or top_k >= 1
    if not (0 <= temperature < math.inf and 0 < top_p <= 1 and is_k):
        raise ValueError("temperature must be finite and >= 0, top_k >= 1 and top_p in (0, 1], got "
                         f"{temperature}, {top_k}, {top_p}")


class Decoder:
    """Feeds tokens, returns the logits of the next one: with a cache (causal) or anew (topk).

    finished: the length of the finished sequence where it is known, else 0: top-k takes the
    capacity of that length.
    """

    def __init__(self, model: UnifiedTransformer, task: str, routing: str, batch: int,
                 max_length: int, finished: int = 0):
        self.model, self.task, self.routing, self.finished = model, task, routing, finished
        self.cache = Cache(model, task, batch, max_length) if routing == "causal" else None
        self.seen = None                                   # ids, valid, spans so far

    def __call__(self, ids: Tensor, valid: Tensor | None = None,
                 spans: Tensor | None = None) -> Tensor:
        """ids (B, t), the next t tokens -> logits (B, V) after the last of them."""
        if valid is None:
            valid = torch.ones_like(ids, dtype=torch.bool)
        if self.cache is not None:
            return self.model(ids, task=self.task, valid=valid, spans=spans, routing="causal",
                              cache=self.cache).logits[:, -1]
        if spans is None:
            spans = torch.zeros_like(ids)
        new = (ids, valid, spans)
        if self.seen is None:
            self.seen = new
        else:
            self.seen = tuple(torch.cat(pair, 1) for pair in zip(self.seen, new))
        ids, valid, spans = self.seen
        if self.model.config.backbone == "emu3":
            spans = None
        n_future = max(0, self.finished - ids.shape[1])
        return self.model(ids, task=self.task, valid=valid, spans=spans, routing=self.routing,
                          n_future=n_future).logits[:, -1]


def left_pad(rows: list, pad: int, device) -> tuple[Tensor, Tensor]:
    """Lists of ids -> ids (B, T) and valid (B, T) bool, so that every row ends at T."""
    length = max(map(len, rows))
    ids = torch.tensor([[pad] * (length - len(row)) + row for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)[:, None]
    return ids, torch.arange(length, device=device) >= length - lengths


def mmu_spans(tokenizer: Tokenizer, valid: Tensor) -> Tensor | None:
    """valid (B, T) bool -> spans (B, T) of a question on a picture; emu3 has none."""
    if tokenizer.backbone != "showo":
        return None
    number = valid.cumsum(1)                               # mmu soi N codes eoi: the first N + 3
    return ((number <= tokenizer.n_image + 3) & valid).long()


def sample(logits: Tensor, temperature: float, generator: torch.Generator | None,
           top_k: int | None = None, top_p: float = 1.0) -> Tensor:
    """logits (B, V) -> ids (B,): argmax at temperature 0, else from softmax(logits / temperature).

    top_k: only the k likeliest ids; top_p: only the likeliest ids that reach this probability
    together, at least one. Both count probabilities over all ids (Hugging Face counts top_p over
    those that top_k has left).
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float()
    logits = logits - logits.amax(-1, keepdim=True)        # first: over 1e-30 all would be infinite
    p = (logits / max(temperature, 1e-30)).softmax(-1).cpu()                   # (B, V)
    p, ids = p.sort(dim=-1, descending=True)
    drop = torch.arange(p.shape[-1]) >= (top_k or p.shape[-1])                 # (V,)
    if top_p < 1:
        likelier = p.double().cumsum(-1) - p               # the probability of all likelier ids
        drop = drop | (likelier > top_p - ROUNDING)
    drop = drop.expand_as(p).clone()
    drop[:, 0] = False
    drawn = torch.multinomial(p.masked_fill(drop, 0.0), 1, generator=generator)
    return ids.gather(1, drawn).squeeze(1).to(logits.device)


# --- Answers ---

@inference
def generate_text(model: UnifiedTransformer, tokenizer: Tokenizer, image: Tensor, question,
                  routing: str = "causal", temperature: float = 0.0,
                  max_tokens: int | None = None, seed: int = 0, top_k: int | None = None,
                  top_p: float = 1.0, stop: tuple = ()):
    """Answer questions on pictures, free-running.

    image: uint8 pixels (H, W, 3) or long codes (h, w) with a str, a batch of either with a list of
    str; returns a str, or a list of them. Give codes where they are known: a VQ may encode its own
    picture to others. An answer ends before the tokenizer's eot, any id of `stop`, after max_tokens
    (default: the tokenizer's text budget), or at the model's max_length, counted from the batch's
    longest prompt. ValueError for input that does not fit.
    """
    check_sampling(routing, temperature, top_k, top_p)
    check_model(model, tokenizer)
    if not isinstance(image, Tensor):
        raise ValueError("generate_text: image must be a tensor of pixels or codes, got "
                         f"{type(image).__name__}: torch.as_tensor(array), or torch.stack(list)")
    single = isinstance(question, str)
    images, questions = (image[None], [question]) if single else (image, list(question))
    if len(images) != len(questions) or not questions:
        raise ValueError(f"generate_text: {len(images)} images for {len(questions)} questions, one "
                         "each is needed (one picture and its question: a str, or image[None])")
    codes = images if images.dtype == torch.long else tokenizer.image.encode(images)
    pictures = tokenizer.image_ids(codes).tolist()
    prompts = [tokenizer.mmu_prompt(*pair) for pair in zip(questions, pictures)]
    steps = tokenizer.text_length if max_tokens is None else max_tokens
    rows = answer_ids(model, tokenizer, prompts, routing, steps, temperature, seed, top_k, top_p,
                      stop)
    texts = [tokenizer.text.decode(row) for row in rows]
    return texts[0] if single else texts


def answer_ids(model, tokenizer, prompts: list, routing: str, steps: int, temperature: float,
               seed: int, top_k: int | None, top_p: float, stop: tuple) -> list:
    """Lists of prompt ids -> lists of answer ids, without what ended them."""
    device = next(model.parameters()).device
    ids, valid = left_pad(prompts, tokenizer.pad, device)
    spans = mmu_spans(tokenizer, valid)
    room = model.config.max_length - ids.shape[1] + 1      # the last token is never fed back
    if steps < 1 or room < 1:
        raise ValueError(f"generate_text: {ids.shape[1]} tokens of prompt and {steps} to write, "
                         f"but max_length is {model.config.max_length}: ask for at least one "
                         "token, shorten the question or raise max_length")
    steps = min(steps, room)
    decode = Decoder(model, "mmu", routing, len(ids), ids.shape[1] + steps)
    generator = torch.Generator().manual_seed(seed)
    ends = torch.tensor([tokenizer.eot, *stop], device=device)
    done = torch.zeros(len(ids), dtype=torch.bool, device=device)
    answers = []
    with model.autocast():
        for _ in range(steps):
            token = sample(decode(ids, valid, spans), temperature, generator, top_k, top_p)
            done = done | torch.isin(token, ends)          # from here on this row is padding
            answers.append(token.masked_fill(done, tokenizer.eot))
            if done.all():
                break
            ids, valid, spans = answers[-1][:, None], ~done[:, None], None
    rows = torch.stack(answers, 1).tolist()
    return [row[:row.index(tokenizer.eot)] if tokenizer.eot in row else row for row in rows]


# --- Pictures ---

class Drawing(NamedTuple):
    """How pictures are drawn; the fields are those of generate_image."""
    routing: str
    temperature: float
    guidance: float
    steps: int
    top_k: int | None
    generator: torch.Generator


def generate_image(model: UnifiedTransformer, tokenizer: Tokenizer, prompt, routing: str = "causal",
                   temperature: float = 1.0, guidance: float = 0.0, steps: int = 12, seed: int = 0,
                   top_k: int | None = None) -> Tensor:
    """Draw pictures from captions: uint8 (H, W, 3) for a str, (B, H, W, 3) for a list of str.

    Where the tokenizer's image codec is Codes, the codes themselves: long (h, w) or (B, h, w).
    guidance w > 0 pushes away from the picture without a caption: c + w (c - u). steps: of
    Show-o's parallel decoding, not read for Emu3. top_k: only the k likeliest codes (Emu3 draws
    with 2,048). ValueError for input that does not fit.
    """
    single = isinstance(prompt, str)
    codes = generate_codes(model, tokenizer, [prompt] if single else list(prompt), routing,
                           temperature, guidance, steps, seed, top_k)
    images = tokenizer.image.decode(codes)
    return images[0] if single else images


@inference
def generate_codes(model: UnifiedTransformer, tokenizer: Tokenizer, prompts: list,
                   routing: str = "causal", temperature: float = 1.0, guidance: float = 0.0,
                   steps: int = 12, seed: int = 0, top_k: int | None = None) -> Tensor:
    """The codes of generate_image's pictures: long (B, h, w), on the CPU."""
    check_sampling(routing, temperature, top_k, guidance=guidance)
    check_model(model, tokenizer)
    if steps < 1 or not prompts:
        raise ValueError("generate_image: steps and prompts must be at least 1, got "
                         f"{steps} and {len(prompts)}")
    generator = torch.Generator().manual_seed(seed)
    how = Drawing(routing, temperature, guidance, steps, top_k, generator)
    draw = draw_parallel if tokenizer.backbone == "showo" else draw_by_row
    with model.autocast():
        return draw(model, tokenizer, prompts, how)


def with_unconditional(prompts: list, guidance: float) -> list:
    """With guidance, every prompt is followed by its twin without a caption, behind all prompts."""
    return prompts + [""] * len(prompts) if guidance else prompts


def guided(logits: Tensor, guidance: float) -> Tensor:
    """(2B, ..), conditional rows over unconditional ones -> (B, ..): c + w (c - u)."""
    if guidance == 0:
        return logits
    conditional, unconditional = logits.float().log_softmax(-1).chunk(2)
    return conditional + guidance * (conditional - unconditional)


def draw_by_row(model, tokenizer: Tokenizer, prompts: list, how: Drawing) -> Tensor:
    """Emu3: one code after the other, an EOL after every row of w. Returns codes (B, h, w)."""
    (h, w), B = tokenizer.grid, len(prompts)
    device = next(model.parameters()).device
    streams = with_unconditional(prompts, how.guidance)
    prefixes = [tokenizer.t2i_prompt(prompt) for prompt in streams]
    ids, valid = left_pad(prefixes, tokenizer.pad, device)
    finished = ids.shape[1] + h * (w + 1) + len(tokenizer.image_footer()) + 1      # and EOS
    length = ids.shape[1] + h * (w + 1) - 2                # the last code and EOL are not fed back
    if length > model.config.max_length:
        raise ValueError(f"generate_image: {length} tokens with the longest prompt, but max_length "
                         f"is {model.config.max_length}: shorten the prompt or raise max_length")
    decode = Decoder(model, "t2i", how.routing, len(ids), length, finished)
    end_of_line = torch.full((len(ids), 1), tokenizer.special["EOL"], device=device)
    first, last = tokenizer.image_start, tokenizer.image_end
    codes = []
    for row in range(h):
        for _ in range(w):
            logits = guided(decode(ids, valid), how.guidance)[:, first:last]
            code = sample(logits, how.temperature, how.generator, how.top_k)       # (B,)
            codes.append(code)
            ids, valid = (code + first).repeat(len(streams) // B)[:, None], None
        if row < h - 1:
            ids = torch.cat((ids, end_of_line), 1)
    return torch.stack(codes, 1).view(B, h, w).cpu()


def draw_parallel(model, tokenizer: Tokenizer, prompts: list, how: Drawing) -> Tensor:
    """Show-o: all codes at once, then the least confident are masked and drawn again.

    cos(pi s / 2 S) of them stay masked after step s of S. Confidence = log p + 4.5 (1 - s / S)
    Gumbel noise (MaskGIT's value, the published linear decay). Without enough of it the safest
    codes, the background, win every early step, and the picture stays empty. Returns codes
    (B, h, w).
    """
    (h, w), N, B = tokenizer.grid, tokenizer.n_image, len(prompts)
    device = next(model.parameters()).device
    streams = with_unconditional(prompts, how.guidance)
    batch = tokenizer.t2i(streams, torch.zeros(len(streams), h, w, dtype=torch.long)).to(device)
    look = span_logits(model, batch, how.routing, N + 2)
    first, last = tokenizer.image_start, tokenizer.image_end
    ids = torch.full((B, N), tokenizer.mask_id, device=device)
    for step in range(1, how.steps + 1):
        batch.ids[:, -N - 1:-1] = ids.repeat(len(streams) // B, 1)     # soi N codes eoi at the end
        logits = guided(look()[:, 1:-1], how.guidance)[..., first:last]            # (B, N, codes)
        drawn = sample(logits.flatten(0, 1), how.temperature, how.generator, how.top_k).view(B, N)
        masked = ids == tokenizer.mask_id
        log_p = logits.float().log_softmax(-1).gather(2, drawn[..., None]).squeeze(2)
        noise = CHOICE_NOISE * (1 - step / how.steps)
        confidence = log_p + noise * gumbel(log_p.shape, how.generator).to(device)
        confidence = confidence.masked_fill(~masked, torch.inf)
        ids = torch.where(masked, drawn + first, ids)
        n_mask = min(int(N * math.cos(math.pi * step / (2 * how.steps))), N - step)
        if step == how.steps or n_mask <= 0:               # nothing stays masked
            break
        ids.scatter_(1, confidence.argsort(1)[:, :n_mask], tokenizer.mask_id)
    return (ids - first).view(B, h, w).cpu()


def gumbel(shape, generator: torch.Generator) -> Tensor:
    """-log(-log u), u ~ U(0, 1)."""
    u = torch.rand(shape, generator=generator).clamp(min=1e-9)
    return -u.log().neg().log()


def span_logits(model, batch, routing: str, n: int):
    """A function from the present ids of `batch` to the logits (B, n, V) of its last n tokens.

    causal: the prompt is fed once, and each call routes and runs the span alone behind it.
    topk: each call runs everything anew.
    """
    if routing != "causal":
        return lambda: model(**batch.inputs(), task="t2i", routing=routing).logits[:, -n:]
    cache = Cache(model, "t2i", *batch.ids.shape)
    model(batch.ids[:, :-n], task="t2i", valid=batch.valid[:, :-n], routing="causal", cache=cache)
    prompt = cache.mark()

    def look() -> Tensor:
        cache.rewind(prompt)
        return model(batch.ids[:, -n:], task="t2i", spans=batch.spans[:, -n:], routing="causal",
                     cache=cache).logits
    return look


if __name__ == "__main__":
    from .draw_and_ask import main
    main()

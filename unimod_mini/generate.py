"""Answers and pictures from a trained model.

    python -m unimod_mini.generate --prompt "a green ring and a red disc" --explain      # out/toy/checkpoint.pt
    python -m unimod_mini.generate --image drawn.png --question "describe ?" --question "how many rings ?"

routing="causal": what is generated token by token is routed by the predictors and decoded with a key/value cache.
routing="topk":   every step runs top-k again over the whole prefix (a picture's with the capacity that its finished
                  sequence will have). It looks at the future of every earlier token, cannot be cached, and serves as
                  the non-causal yardstick.
Show-o's pictures are decoded in parallel (MaskGIT, arXiv 2202.04200), Emu3's row by row.

Legend: B rows, T tokens so far, N image tokens, V vocabulary.
"""

import math

import torch
from torch import Tensor

from .cache import Cache
from .tokenizer import Tokenizer
from .transformer import UnifiedTransformer, inference

CHOICE_NOISE = 4.5   # of draw_parallel
ROUNDING = 1e-6      # of a sum of float32 probabilities: ids that reach top_p exactly end there


def check_model(model: UnifiedTransformer, tokenizer: Tokenizer) -> None:
    """ValueError when this tokenizer's ids are not those of the model, and for weights that are not finite.

    Reads every weight once, which is what one more token would cost.
    """
    config, weights = model.config, dict(model.named_parameters())
    finite = torch.stack([weight.isfinite().all() for weight in weights.values()]).tolist()
    if wrong := [name for name, fine in zip(weights, finite) if not fine]:
        raise ValueError(f"{len(wrong)} of the model's weights are not finite, {wrong[0]} is the first: take a "
                         "checkpoint from before its training failed")
    theirs = tokenizer.backbone, tokenizer.image_start
    if theirs != (config.backbone, config.image_start) or tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"the tokenizer is of another model: {tokenizer.backbone}, image codes from "
                         f"{tokenizer.image_start}, {tokenizer.vocab_size} ids; the model: {config.backbone}, from "
                         f"{config.image_start}, {config.vocab_size}. Use the one that the model was trained with")


class Decoder:
    """Feeds tokens and returns the logits of the next one: with a cache (causal) or by recomputing (topk).

    finished: the length of the finished sequence where it is known, else 0: top-k takes the capacity of that length.
    """

    def __init__(self, model: UnifiedTransformer, task: str, routing: str, batch: int, max_length: int,
                 finished: int = 0):
        self.model, self.task, self.routing, self.finished = model, task, routing, finished
        self.cache = Cache(model, task, batch, max_length) if routing == "causal" else None
        self.seen = None

    def __call__(self, ids: Tensor, valid: Tensor | None = None, spans: Tensor | None = None) -> Tensor:
        """ids (B, t), the next t tokens -> logits (B, V) after the last of them."""
        valid = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid
        if self.cache is not None:
            return self.model(ids, task=self.task, valid=valid, spans=spans, routing="causal",
                              cache=self.cache).logits[:, -1]
        spans = torch.zeros_like(ids) if spans is None else spans
        new = (ids, valid, spans)
        self.seen = new if self.seen is None else tuple(torch.cat(pair, 1) for pair in zip(self.seen, new))
        ids, valid, spans = self.seen
        spans = spans if self.model.config.backbone == "showo" else None
        return self.model(ids, task=self.task, valid=valid, spans=spans, routing=self.routing,
                          coming=max(0, self.finished - ids.shape[1])).logits[:, -1]


def left_pad(rows: list, pad: int, device) -> tuple[Tensor, Tensor]:
    """Lists of ids -> ids (B, T) and valid (B, T) bool, so that every row ends at T."""
    length = max(map(len, rows))
    ids = torch.tensor([[pad] * (length - len(row)) + row for row in rows], device=device)
    valid = torch.tensor([[False] * (length - len(row)) + [True] * len(row) for row in rows], device=device)
    return ids, valid


def mmu_spans(tokenizer: Tokenizer, valid: Tensor) -> Tensor | None:
    """valid (B, T) bool -> spans (B, T) of a question on a picture; emu3 has none."""
    if tokenizer.backbone != "showo":
        return None
    return ((valid.cumsum(1) <= tokenizer.n_image + 3) & valid).long()       # mmu soi N codes eoi: the first N + 3


def sample(logits: Tensor, temperature: float, generator: torch.Generator | None, top_k: int | None = None,
           top_p: float = 1.0) -> Tensor:
    """logits (B, V) -> ids (B,): argmax at temperature 0, else a draw from softmax(logits / temperature).

    top_k: only the k likeliest ids; top_p: only the likeliest ids that reach this probability together, at least one.
    Both count probabilities over all ids (Hugging Face counts top_p over those that top_k has left).
    """
    if temperature == 0:
        return logits.argmax(-1)
    below = logits.float() - logits.float().amax(-1, keepdim=True)           # first: over 1e-30 all would be infinite
    p, ids = (below / max(temperature, 1e-30)).softmax(-1).cpu().sort(dim=-1, descending=True)                # (B, V)
    drop = torch.arange(p.shape[-1]) >= (top_k or p.shape[-1])               # (V,)
    if top_p < 1:
        likelier = p.double().cumsum(-1) - p               # (B, V) probability of the likelier ids
        drop = drop | (likelier > top_p - ROUNDING)
    drop = drop.expand_as(p).clone()
    drop[:, 0] = False
    drawn = torch.multinomial(p.masked_fill(drop, 0.0), 1, generator=generator)
    return ids.gather(1, drawn).squeeze(1).to(logits.device)


def check_sampling(routing: str, temperature: float, top_k: int | None = None, top_p: float = 1.0,
                   guidance: float = 0.0) -> None:
    if routing not in ("causal", "topk"):
        raise ValueError(f'routing must be "causal" or "topk" (non-causal), got {routing!r}')
    if not 0 <= guidance < math.inf:
        raise ValueError(f"guidance must be finite and >= 0, got {guidance}")
    if not 0 <= temperature < math.inf or not 0 < top_p <= 1 or (top_k is not None and top_k < 1):
        raise ValueError("temperature must be finite and >= 0, top_k >= 1 and top_p in (0, 1], got "
                         f"{temperature}, {top_k}, {top_p}")


@inference
def generate_text(model: UnifiedTransformer, tokenizer: Tokenizer, image: Tensor, question, routing: str = "causal",
                  temperature: float = 0.0, max_tokens: int | None = None, seed: int = 0, top_k: int | None = None,
                  top_p: float = 1.0, stop: tuple = ()):
    """Answer questions on pictures, free-running.

    image: uint8 pixels (H, W, 3) or long codes (h, w) with a str, a batch of either with a list of str. Returns a str,
    or a list of them. Codes that are known need not be decoded: a VQ may code its own picture otherwise. An answer ends
    before the tokenizer's eot, any id of `stop`, after max_tokens (default: the tokenizer's text budget), or at the
    model's max_length, counted from the batch's longest prompt.
    """
    check_sampling(routing, temperature, top_k, top_p)
    check_model(model, tokenizer)
    if not isinstance(image, Tensor):
        raise ValueError(f"generate_text: image must be a tensor of pixels or codes, got {type(image).__name__}: "
                         "torch.as_tensor(array), or torch.stack(list)")
    single = isinstance(question, str)
    images, questions = (image[None], [question]) if single else (image, list(question))
    if len(images) != len(questions) or not questions:
        raise ValueError(f"generate_text: {len(images)} images for {len(questions)} questions, one each is needed (one "
                         "picture and its question: a str, or image[None])")
    device = next(model.parameters()).device
    codes = images if images.dtype == torch.long else tokenizer.image.encode(images)
    picture = tokenizer.image_ids(codes).tolist()
    ids, valid = left_pad([tokenizer.mmu_prompt(q, p) for q, p in zip(questions, picture)], tokenizer.pad, device)
    spans = mmu_spans(tokenizer, valid)
    steps = tokenizer.text_length if max_tokens is None else max_tokens
    room = model.config.max_length - ids.shape[1] + 1                        # the last token is never fed back
    if steps < 1 or room < 1:
        raise ValueError(f"generate_text: {ids.shape[1]} tokens of prompt and {steps} to write, but max_length is "
                         f"{model.config.max_length}: ask for at least one token, shorten the question or raise "
                         "max_length")
    steps, stops = min(steps, room), torch.tensor([tokenizer.eot, *stop], device=device)
    decode = Decoder(model, "mmu", routing, len(ids), ids.shape[1] + steps)
    generator, done = torch.Generator().manual_seed(seed), torch.zeros(len(ids), dtype=torch.bool, device=device)
    answers = []
    with model.autocast():
        for _ in range(steps):
            token = sample(decode(ids, valid, spans), temperature, generator, top_k, top_p)
            done = done | torch.isin(token, stops)         # a row that has ended is padding from here on
            answers.append(token.masked_fill(done, tokenizer.eot))
            if done.all():
                break
            ids, valid, spans = answers[-1][:, None], ~done[:, None], None
    texts = []
    for row in torch.stack(answers, 1).tolist():
        texts.append(tokenizer.text.decode(row[:row.index(tokenizer.eot)] if tokenizer.eot in row else row))
    return texts[0] if single else texts


def generate_image(model: UnifiedTransformer, tokenizer: Tokenizer, prompt, routing: str = "causal",
                   temperature: float = 1.0, guidance: float = 0.0, steps: int = 12, seed: int = 0,
                   top_k: int | None = None) -> Tensor:
    """Draw pictures from captions: uint8 (H, W, 3) for a str, (B, H, W, 3) for a list of str; the codes themselves,
    long (h, w) or (B, h, w), where the tokenizer's image codec is Codes.

    guidance w > 0 pushes away from the picture without a caption: c + w (c - u). steps: of Show-o's parallel decoding,
    not read for Emu3. top_k: only the k likeliest codes (Emu3 draws with 2,048).
    """
    single = isinstance(prompt, str)
    prompts = [prompt] if single else list(prompt)
    images = tokenizer.image.decode(generate_codes(model, tokenizer, prompts, routing, temperature, guidance, steps, seed,
                                                   top_k))
    return images[0] if single else images


@inference
def generate_codes(model: UnifiedTransformer, tokenizer: Tokenizer, prompts: list, routing: str = "causal",
                   temperature: float = 1.0, guidance: float = 0.0, steps: int = 12, seed: int = 0,
                   top_k: int | None = None) -> Tensor:
    """The codes of generate_image's pictures: long (B, h, w), on the CPU."""
    check_sampling(routing, temperature, top_k, guidance=guidance)
    check_model(model, tokenizer)
    if steps < 1 or not prompts:
        raise ValueError(f"generate_image: steps and prompts must be at least 1, got {steps} and {len(prompts)}")
    generator = torch.Generator().manual_seed(seed)
    given = model, tokenizer, prompts, routing, temperature, guidance, generator, top_k
    with model.autocast():
        return draw_parallel(*given, steps) if tokenizer.backbone == "showo" else draw_by_row(*given)


def guided(logits: Tensor, guidance: float) -> Tensor:
    """(2B, ..) conditional rows over unconditional ones -> (B, ..): c + w (c - u). Without guidance: unchanged."""
    if guidance == 0:
        return logits
    conditional, unconditional = logits.float().log_softmax(-1).chunk(2)
    return conditional + guidance * (conditional - unconditional)


def draw_by_row(model, tokenizer, prompts, routing, temperature, guidance, generator, top_k) -> Tensor:
    """Emu3: one code after the other, an EOL after every row of w. Returns codes (B, h, w) on the CPU.

    ValueError when prompt and picture are longer than the model's max_length.
    """
    (h, w), count = tokenizer.grid, len(prompts)
    device = next(model.parameters()).device
    streams = prompts + [""] * count if guidance else prompts
    ids, valid = left_pad([tokenizer.t2i_prompt(prompt) for prompt in streams], tokenizer.pad, device)
    finished = ids.shape[1] + h * (w + 1) + len(tokenizer.image_footer()) + 1                # and EOS
    length = ids.shape[1] + h * (w + 1) - 2                # the last code and its EOL are never fed back
    if length > model.config.max_length:
        raise ValueError(f"generate_image: {length} tokens with the longest prompt, but max_length is "
                         f"{model.config.max_length}: shorten the prompt or raise max_length")
    decode = Decoder(model, "t2i", routing, len(ids), length, finished)
    end_of_line = torch.full((len(ids), 1), tokenizer.special["EOL"], device=device)
    image = []
    for row in range(h):
        for _ in range(w):
            logits = guided(decode(ids, valid), guidance)[:, tokenizer.image_start:tokenizer.image_end]
            code = sample(logits, temperature, generator, top_k)             # (B,)
            image.append(code)
            ids, valid = (code + tokenizer.image_start).repeat(len(streams) // count)[:, None], None
        if row < h - 1:
            ids = torch.cat((ids, end_of_line), 1)
    return torch.stack(image, 1).view(count, h, w).cpu()


def draw_parallel(model, tokenizer, prompts, routing, temperature, guidance, generator, top_k, steps) -> Tensor:
    """Show-o: all codes at once, the least confident masked again, cos(pi s / 2 S) of them after step s of S.

    Confidence = log p + 4.5 (1 - s / S) Gumbel noise (MaskGIT's value, the published linear decay). Without enough of
    it the safest codes, the background, win every early step and the picture stays empty. Returns codes (B, h, w) on
    the CPU.
    """
    (h, w), N, count = tokenizer.grid, tokenizer.n_image, len(prompts)
    device = next(model.parameters()).device
    streams = prompts + [""] * count if guidance else prompts
    batch = tokenizer.t2i(streams, torch.zeros(len(streams), h, w, dtype=torch.long)).to(device)
    look = parallel_model(model, batch, routing, N + 2)
    codes = torch.full((count, N), tokenizer.mask_id, device=device)
    for step in range(1, steps + 1):
        batch.ids[:, -N - 1:-1] = codes.repeat(len(streams) // count, 1)     # soi N codes eoi stand at the end
        logits = guided(look()[:, 1:-1], guidance)[..., tokenizer.image_start:tokenizer.image_end]   # (B, N, n_codes)
        drawn = sample(logits.flatten(0, 1), temperature, generator, top_k).view(count, N)
        hidden = codes == tokenizer.mask_id
        confidence = logits.float().log_softmax(-1).gather(2, drawn[..., None]).squeeze(2)
        gumbel = -torch.rand(confidence.shape, generator=generator).clamp(min=1e-9).log_().neg_().log_().to(device)
        confidence = (confidence + CHOICE_NOISE * (1 - step / steps) * gumbel).masked_fill(~hidden, torch.inf)
        codes = torch.where(hidden, drawn + tokenizer.image_start, codes)
        n_mask = min(int(N * math.cos(math.pi * step / (2 * steps))), N - step)
        if step == steps or n_mask <= 0:                   # nothing is hidden any more
            break
        codes.scatter_(1, confidence.argsort(1)[:, :n_mask], tokenizer.mask_id)
    return (codes - tokenizer.image_start).view(count, h, w).cpu()


def parallel_model(model, batch, routing: str, n: int):
    """A function from the present ids of `batch` to the logits (B, n, V) of its last n tokens, the span.

    causal: the prompt is prefilled once, and each call routes and runs the span alone behind it; topk: everything anew.
    """
    if routing != "causal":
        return lambda: model(**batch.inputs(), task="t2i", routing=routing).logits[:, -n:]
    cache = Cache(model, "t2i", *batch.ids.shape)
    model(batch.ids[:, :-n], task="t2i", valid=batch.valid[:, :-n], routing="causal", cache=cache)
    prompt = cache.mark()

    def look() -> Tensor:
        cache.rewind(prompt)
        return model(batch.ids[:, -n:], task="t2i", spans=batch.spans[:, -n:], routing="causal", cache=cache).logits
    return look


if __name__ == "__main__":
    from .draw_and_ask import main
    main()

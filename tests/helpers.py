"""Tiny models, random calls, and the slow, obvious twin of the whole forward pass.

Legend: B batch, T tokens, D width, H heads, G key/value heads, d head width.
"""
import io
import math
import tarfile

import torch
from hypothesis import strategies as st

from unimod_mini.config import ModelConfig
from unimod_mini.plan import Plan
from unimod_mini.transformer import UnifiedTransformer, rotary

BACKBONES = ("showo", "emu3")
N_LAYER = 3
keeps = st.one_of(st.sampled_from((0.0, 1.0, 0.05, 0.25, 0.5, 0.75, 0.999)), st.floats(0, 1))
seeds = st.integers(0, 2**32 - 1)


def plans(n_layer=N_LAYER, tasks=("t2i", "mmu"), keep=keeps):
    """Strategy: any Plan, shared or not."""
    row = st.lists(keep, min_size=n_layer, max_size=n_layer)
    return st.builds(Plan, st.fixed_dictionaries({task: row for task in tasks}), st.booleans())


def tiny(backbone, **changes):
    """A config of a few thousand parameters; emu3 has grouped heads, showo rotates half of each
    head.
    """
    given = dict(n_layer=N_LAYER, n_head=4, n_kv_head=2 if backbone == "emu3" else 4, d_model=32, d_ff=40,
                 vocab_size=30, max_length=64, image_start=20, rope_fraction=1.0 if backbone == "emu3" else 0.5,
                 qk_norm=backbone == "showo")
    return ModelConfig(backbone, **given | changes)


def build(config, plan=None, seed=0, dtype=torch.float64):
    """A model whose every weight, router and predictor too, is random and of order one in its
    effect.
    """
    torch.manual_seed(seed)
    model = UnifiedTransformer(config, plan).to(dtype).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(std=1.0 if "embed" in name or "position" in name else weight.shape[1] ** -0.5)
            else:
                weight.normal_(std=0.3).add_("norm" in name and name.endswith("weight"))
        for threshold in model.buffers():
            threshold.normal_(std=0.2)
    return model


def call(config, batch, length, seed, padding="none", spans=False, places="default"):
    """Keyword arguments of forward, rows of different lengths.

    padding: none, left, right, both, holes; at least one valid token a row. spans: up to two spans
    a row, over valid tokens. places: default positions, or explicit ones that are apart or
    shuffled. Padding holds random ids.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high, *shape):
        return torch.randint(low, high + 1, shape, generator=generator)

    out = dict(ids=draw(0, config.vocab_size - 1, batch, length), positions=None, spans=None, valid=None)
    valid = torch.ones(batch, length, dtype=torch.bool)
    for row in valid:
        count = draw(1, length).item()
        start = {"left": length - count, "right": 0}.get(padding, draw(0, length - count).item())
        if padding == "holes":
            row[torch.randperm(length, generator=generator)[count:]] = False
        elif padding != "none":
            row[:start], row[start + count:] = False, False
    if padding != "none":
        out["valid"] = valid
    if spans:
        out["spans"] = torch.zeros(batch, length, dtype=torch.long)
        for row, ok in zip(out["spans"], valid):
            where = ok.nonzero().squeeze(1)
            a, b, c = draw(0, len(where), 3).sort().values.tolist()
            row[where[a:b]], row[where[b:c]] = 1, 2
    if places == "apart":
        out["positions"] = draw(1, 3, batch, length).cumsum(1)
    elif places == "shuffled":
        out["positions"] = torch.stack([torch.randperm(length, generator=generator) for _ in range(batch)]) + 2
    return out


def calls(config, **fixed):
    """Strategy: random calls of one config; a fixed argument narrows it."""
    free = dict(batch=st.integers(1, 3), length=st.integers(1, 12), seed=seeds, spans=st.booleans(),
                padding=st.sampled_from(("none", "left", "right", "both", "holes")),
                places=st.sampled_from(("default", "apart", "shuffled")))
    fixed = {name: value if isinstance(value, st.SearchStrategy) else st.just(value) for name, value in fixed.items()}
    return st.builds(call, st.just(config), **free | fixed)


def real(inputs):
    """(B, T) bool: the tokens that are not padding."""
    return torch.ones_like(inputs["ids"], dtype=torch.bool) if inputs["valid"] is None else inputs["valid"]


# ---------------------------------------------------------------- the twins

def count(keep, n):
    """floor(keep n + 1/2)"""
    return math.floor(keep * n + 0.5)


def golden_order(valid):
    """Valid token numbers n = 0, 1 .. sorted by frac(n golden ratio), as token indices."""
    where = [i for i, ok in enumerate(valid) if ok]
    return [where[n] for n in sorted(range(len(where)), key=lambda n: n * 2654435769 % 2**32)]


def naive_topk(scores, k, valid):
    """The k best valid tokens of one row as a sorted list; NaN is worst, ties in golden order."""
    value = [-math.inf if math.isnan(s) else s for s in scores]
    order = golden_order(valid)
    return sorted(sorted(order, key=lambda i: (-value[i], order.index(i)))[:k])


def naive_sees(i, j, positions, spans, key):
    """May query i look at key j? `key` lists the tokens that are keys; every token sees itself."""
    same = spans is not None and spans[i] == spans[j] != 0
    return i == j or (bool(key[j]) and bool(positions[j] <= positions[i] or same))


def naive_norm(module, x):
    """LayerNorm or RMSNorm, by name."""
    if isinstance(module, torch.nn.LayerNorm):
        x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * module.weight
    return x + module.bias if isinstance(module, torch.nn.LayerNorm) else x


def naive_linear(module, x):
    return x @ module.weight.T + (0 if module.bias is None else module.bias)


def naive_rotate(x, rope):
    """x (T, d), rope (T, 2, r): the pair (a_i, a_{i + r/2}) is multiplied by cos + i sin, as
    complex numbers.
    """
    half = rope.shape[-1] // 2
    z = torch.complex(x[:, :half], x[:, half:2 * half]) * torch.complex(rope[:, 0, half:], rope[:, 1, half:])
    return torch.cat((z.real, z.imag, x[:, 2 * half:]), 1)


def naive_block(block, config, x, positions, spans, key):
    """The update u of one row x (T, D) at full length: tokens outside `key` are queries, but no
    keys.
    """
    attention, (T, D), d = block.attention, x.shape, config.head_width
    rope = rotary(positions[None], config.rope_dims, config.rope_theta, torch.promote_types(x.dtype, torch.float32))[0]
    sees = torch.tensor([[naive_sees(i, j, positions, spans, key) for j in range(T)] for i in range(T)])
    normed = naive_norm(block.norm, x)
    qs, ks, vs = (naive_linear(part, normed).split(d, dim=1) for part in (attention.q, attention.k, attention.v))
    heads = []
    for h in range(config.n_head):
        g = h // (config.n_head // config.n_kv_head)
        q, k, v = qs[h], ks[g], vs[g]                                                   # (T, d)
        if config.qk_norm:
            q, k = naive_norm(attention.q_norm, q), naive_norm(attention.k_norm, k)
        logits = naive_rotate(q, rope) @ naive_rotate(k, rope).T / math.sqrt(d)
        heads.append(logits.masked_fill(~sees, -math.inf).softmax(1) @ v)
    a = naive_linear(attention.out, torch.cat(heads, 1))
    inner = normed if config.backbone == "showo" else naive_norm(block.norm_mlp, x + a)
    up = naive_linear(block.mlp.up, inner)
    if config.backbone == "showo":
        hidden = 0.5 * up * (1 + torch.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
    else:
        gate = naive_linear(block.mlp.gate, inner)
        hidden = gate / (1 + torch.exp(-gate)) * up
    return a + naive_linear(block.mlp.down, hidden)


def naive_row(model, task, ids, positions, spans, valid, chosen):
    """One row of tokens -> logits (T, V) and the router scores of each routed layer.

    chosen[layer]: (T,) bool, who is routed, None in a dense or skipped layer. No token is ever
    gathered.
    """
    config, x, scores = model.config, model.embed.weight[ids], []
    if config.image_positions:
        image = (ids >= config.image_start) & valid
        place = (image.cumsum(0) - 1) % config.image_positions
        x = x + model.image_position.weight[place] * image[:, None]
    for layer, keep in enumerate(model.plan.keep[task]):
        if keep == 0:
            continue
        members, gate = valid, 1
        if keep < 1:
            r = naive_linear(model.router(layer, task).score, x).squeeze(1)
            scores.append(r)
            members = chosen[layer]
            gate = {"linear": 1 + r, "sigmoid": 2 / (1 + torch.exp(-r)),
                    "tanh": 1 + 0.2 * torch.tanh(r)}[config.gate][:, None]
        update = gate * naive_block(model.blocks[layer], config, x, positions, spans, members)
        x = x + update * members[:, None]
    return naive_linear(model.head, naive_norm(model.norm, x)), scores


def naive_forward(model, task, inputs, chosen):
    """The twin of forward, row by row. chosen[layer]: (B, T) bool or None.

    Returns logits (B, T, V), scores.
    """
    ids, valid, rows = inputs["ids"], real(inputs), []
    for b in range(len(ids)):
        seen = (valid[b].cumsum(0) - 1).clamp(min=0)
        rows.append(naive_row(model, task, ids[b], seen if inputs["positions"] is None else inputs["positions"][b],
                              None if inputs["spans"] is None else inputs["spans"][b], valid[b],
                              [None if c is None else c[b] for c in chosen]))
    logits, scores = zip(*rows)
    return torch.stack(logits), [torch.stack(s) for s in zip(*scores)]


# ---------------------------------------------------------------- files

def tar_of(path, files, mode="w"):
    """{name: bytes} -> a tar; mode "w": without compression, "w:gz"."""
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            part = tarfile.TarInfo(name)
            part.size = len(content)
            archive.addfile(part, io.BytesIO(content))
    return path

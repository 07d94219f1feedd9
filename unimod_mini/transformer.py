"""The unified transformer: one decoder for text and images, with the two backbones that UniMoD was shown on.

"showo": Phi-style (Show-o, arXiv 2408.12528): parallel blocks x + attn(LN x) + mlp(LN x), LayerNorm, GELU, biases,
         rotary on part of each head, LayerNorm on queries and keys, image spans that see themselves in both directions.
"emu3":  Llama-style (Emu3, arXiv 2409.18869): RMSNorm, SwiGLU, grouped key/value heads, no biases, causal everywhere.

A `Plan` (plan.py) decides for each task and layer which tokens the block processes. Read `UnifiedTransformer.layer`:
it is the whole method. Departure from the usual: a block returns its *update* u = attn + mlp without the residual, so
that dense and routed layers are the same line, x + g u, with g = 1 in a dense one.

Legend: B batch, T tokens, K kept tokens, D width, H heads, G key/value heads, d head width, V vocabulary.
"""

import re
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import wraps
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ModelConfig
from .plan import TASKS, Plan
from .routers import GATES, TaskRouter, add_tokens, flat, gather_tokens, tie_order


# --------------------------------------------------------------------------------------------------------------
# Who sees whom: one rule for every mask
# --------------------------------------------------------------------------------------------------------------

def attention_mask(positions: Tensor, spans: Tensor | None, valid: Tensor | None) -> Tensor:
    """(B, 1, T, T) bool, True where query i may look at key j.

    j is valid  and  (pos_j <= pos_i  or  (span_i == span_j and span_i != 0)); a token always sees itself.
    """
    see = positions[:, None, :] <= positions[:, :, None]
    if spans is not None:
        see = see | ((spans[:, None, :] == spans[:, :, None]) & (spans != 0)[:, :, None])
    if valid is not None:
        see = (see & valid[:, None, :]) | torch.eye(see.shape[-1], dtype=torch.bool, device=see.device)
    return see[:, None]


class Context(NamedTuple):
    """What every layer needs to know about the tokens, computed once a forward."""
    positions: Tensor              # (B, T)
    spans: Tensor | None           # (B, T), 0 = causal
    valid: Tensor | None           # (B, T) bool
    order: Tensor | None           # (B, T) order in which ties are broken
    rope: Tensor                   # (B, T, 2, rope_dims) cos and signed sin, see rotary
    mask: Tensor | None            # (B, 1, T, T); None: plain causal, the fast kernel
    ascending: bool                # positions ascend with the index, so that a sorted subset is causal too
    coming: int                    # tokens that the finished sequence will have behind these


def rotary(positions: Tensor, dims: int, theta: float, dtype=torch.float32) -> Tensor:
    """c = cos, s = sin of position x theta^(-2 i / dims) as (c, c) and (-s, s): (B, T, 2, dims)."""
    frequency = theta ** (-torch.arange(0, dims, 2, device=positions.device, dtype=dtype) / dims)
    angle = positions[..., None].to(dtype) * frequency                       # (B, T, dims / 2)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)), dim=-2)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Half-rotate layout: (a, b) -> (a cos - b sin, b cos + a sin) = (a, b) (cos, cos) + (b, a) (-sin, sin).

    a and b: the halves of the rotated dims. x (B, T, H, d), rope (B, T, 2, r); dims past r pass unchanged.
    """
    cos, sin = rope.to(x.dtype)[:, :, None].unbind(-2)                       # (B, T, 1, r)
    turned, rest = x.split((rope.shape[-1], x.shape[-1] - rope.shape[-1]), dim=-1)
    turned = turned * cos + turned.roll(rope.shape[-1] // 2, -1) * sin
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


# --------------------------------------------------------------------------------------------------------------
# The block
# --------------------------------------------------------------------------------------------------------------

EXPANDED = ("cuda",)   # devices on which torch has no fast kernel for grouped keys under a mask: keys are repeated


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False, dropout: float = 0.0):
    """softmax(q k^T / sqrt(d) + mask) v in the dtype of q: q (B, H, T, d), k and v (B, G, T', d) -> (B, H, T, d)."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and mask is not None and q.device.type in EXPANDED:
        k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
    with torch.autocast(q.device.type, enabled=False):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, dropout_p=dropout,
                                              enable_gqa=q.shape[1] != k.shape[1])


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * w. torch has a kernel for GPUs; on a CPU this form runs fewer operators."""

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda or x.dtype not in (torch.float32, torch.float64):
            return super().forward(x)
        mean_square = torch.linalg.vecdot(x, x)[..., None] / x.shape[-1]
        return x * (torch.rsqrt(mean_square + self.eps) * self.weight)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        bias = config.backbone == "showo"
        d = config.head_width
        # products of their own: the halves of one wide product would be copied together in every backward pass
        self.q = nn.Linear(config.d_model, config.n_head * d, bias=bias)
        self.k = nn.Linear(config.d_model, config.n_kv_head * d, bias=bias)
        self.v = nn.Linear(config.d_model, config.n_kv_head * d, bias=bias)
        self.out = nn.Linear(config.d_model, config.d_model, bias=bias)
        self.q_norm = nn.LayerNorm(d, eps=1e-5) if config.qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(d, eps=1e-5) if config.qk_norm else nn.Identity()

    def queries_keys_values(self, x: Tensor, rope: Tensor):
        """x (B, T, D) -> q (B, H, T, d), k and v (B, G, T, d), rotated."""
        q, k, v = (part(x).unflatten(-1, (-1, self.config.head_width)) for part in (self.q, self.k, self.v))
        q, k = rotate(self.q_norm(q), rope), rotate(self.k_norm(k), rope)    # (B, T, H, d), (B, T, G, d)
        on_cpu = x.device.type == "cpu" and torch.is_autocast_enabled("cpu")
        if on_cpu or q.dtype != v.dtype:                   # bf16 attention is slower than float32 on a CPU
            q, k, v = (t.to(torch.float32 if on_cpu else v.dtype) for t in (q, k, v))
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def forward(self, x: Tensor, rope: Tensor, mask: Tensor | None, cache=None) -> Tensor:
        q, k, v = self.queries_keys_values(x, rope)
        if cache is not None:
            y = cache.attend(q, k, v)
        else:
            y = attend(q, k, v, mask, mask is None, self.config.attention_dropout if self.training else 0.0)
        return self.out(y.transpose(1, 2).reshape(x.shape))                  # (B, H, T, d) -> (B, T, D)


class MLP(nn.Module):
    """GELU (tanh form) for showo, SwiGLU for emu3: silu(x W_gate) * (x W_up)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        bias = config.backbone == "showo"
        self.gate = None if bias else nn.Linear(config.d_model, config.d_ff, bias=False)
        self.up = nn.Linear(config.d_model, config.d_ff, bias=bias)
        self.down = nn.Linear(config.d_ff, config.d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(F.gelu(self.up(x), approximate="tanh"))
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Returns the update u that the residual stream receives, without the residual."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.parallel = config.backbone == "showo"
        norm = nn.LayerNorm if self.parallel else RMSNorm
        self.norm = norm(config.d_model, eps=1e-5)
        self.norm_mlp = None if self.parallel else norm(config.d_model, eps=1e-5)
        self.attention = Attention(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope: Tensor, mask: Tensor | None, cache=None) -> Tensor:
        normed = self.norm(x)
        a = self.attention(normed, rope, mask, cache)
        if self.parallel:                                  # Phi:   u = attn(LN x) + mlp(LN x)
            return a + self.mlp(normed)
        return a + self.mlp(self.norm_mlp(x + a))          # Llama: u = a + mlp(norm(x + a)),  a = attn(norm x)


# --------------------------------------------------------------------------------------------------------------
# The model
# --------------------------------------------------------------------------------------------------------------

class Output(NamedTuple):
    logits: Tensor                 # (B, T, V)
    routing: list                  # a Routing for each routed layer, None for a dense or a skipped one


def described(x) -> str:
    """What was given, for an error."""
    return f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else f"a {type(x).__name__}"


@contextmanager
def evaluating(model: nn.Module):
    """Inside, without dropout; afterwards every module trains on if it did before."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


WRAPPERS = re.compile(r"\b(_orig_mod|module)\.")                             # of torch.compile, of DDP


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of torch.compile(model) or DistributedDataParallel(model); the model itself has no wrapper."""
    while (inner := getattr(model, "_orig_mod", getattr(model, "module", None))) is not None:
        model = inner
    return model


def without_wrappers(weights: dict) -> dict:
    """{name: tensor} of a wrapped model under the names of the model itself."""
    return {WRAPPERS.sub("", name): weight for name, weight in weights.items()}


def inference(function):
    """Decorates function(model, ..): without gradients, dropout or wrappers."""
    @wraps(function)
    def run(model, *args, **options):
        model = unwrapped(model)
        with torch.no_grad(), evaluating(model):
            return function(model, *args, **options)
    return run


PRECISIONS = ("float32", "bf16")


class UnifiedTransformer(nn.Module):
    """model(ids, task) -> Output. plan=None: every layer dense. Weights are float32 unless converted.

    precision: "bf16" runs matrix products in bf16 (autocast over the float32 weights), whoever calls the model.
    Residual stream, router scores and losses stay float32.
    """
    precision = "float32"          # one of PRECISIONS; copies, checkpoints and generation keep it

    def __init__(self, config: ModelConfig, plan: Plan | None = None):
        super().__init__()
        if plan is not None and not isinstance(plan, Plan):
            raise ValueError(f"plan must be a Plan or None (dense), got a {type(plan).__name__}: Plan({{task: keeps}})")
        if plan is not None and plan.n_layer != config.n_layer:
            raise ValueError(f"the plan has {plan.n_layer} layers, the model {config.n_layer}: make one for this model")
        plan = plan or Plan.dense(config.n_layer, TASKS)
        self.config, self.plan = config, Plan(plan.keep, plan.shared_router)  # its own: a plan's rows are a plain dict
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.image_position = nn.Embedding(config.image_positions, config.d_model) if config.image_positions else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        showo = config.backbone == "showo"
        self.norm = (nn.LayerNorm if showo else RMSNorm)(config.d_model, eps=1e-5)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=showo)
        self.apply(self.init_weights)
        for block in self.blocks:                          # residual outputs start small: GPT-2's 1/sqrt(2 L)
            for linear in (block.attention.out, block.mlp.down):
                nn.init.normal_(linear.weight, std=0.02 / (2 * config.n_layer) ** 0.5)
        self.routers = nn.ModuleList(self.make_routers(layer) for layer in range(config.n_layer))

    @staticmethod
    def init_weights(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def make_routers(self, layer: int) -> nn.ModuleDict:
        """One TaskRouter for each pruning task of this layer, or a single one under "shared"."""
        tasks, hidden = self.plan.routed(layer), self.config.predictor_hidden
        if self.plan.shared_router and tasks:
            return nn.ModuleDict({"shared": TaskRouter(self.config.d_model, hidden, tasks)})
        return nn.ModuleDict({task: TaskRouter(self.config.d_model, hidden, [task]) for task in tasks})

    def router(self, layer: int, task: str) -> TaskRouter:
        return self.routers[layer]["shared" if self.plan.shared_router else task]

    def with_plan(self, plan: Plan | None, **changes) -> "UnifiedTransformer":
        """A copy with this plan's (fresh) routers (None: dense) and, bit for bit, this model's other weights."""
        weight = self.embed.weight
        copy = UnifiedTransformer(replace(self.config, **changes), plan).to(weight.device, weight.dtype)
        copy.train(self.training)
        copy.precision = self.precision
        fresh = {name: weight for name, weight in copy.state_dict().items() if name.startswith("routers.")}
        own = {name: weight for name, weight in self.state_dict().items() if not name.startswith("routers.")}
        copy.load_state_dict(own | fresh)                  # strict: an error lists the names that do not fit
        return copy

    def forward(self, ids: Tensor, task: str = "t2i", positions: Tensor | None = None, spans: Tensor | None = None,
                valid: Tensor | None = None, routing: str = "topk", cache=None, coming: int = 0) -> Output:
        """ids (B, T) long, positions and spans (B, T) long, valid (B, T) bool -> logits (B, T, V) and routings.

        positions default to counting the valid tokens; spans None: causal everywhere; routing "topk" (training,
        looks at the whole sequence), "predicted" (the same, ranked by the predictors: objectives.training_rule) or
        "causal" (inference, looks at no later token; thresholds by predictor.calibrate).
        A span id belongs to one run of tokens. cache: see cache.py. coming: routers.select_topk.
        Raises ValueError for an unknown task or routing rule, shapes that do not fit, and ids out of range (CPU).
        """
        self.check(ids, task, positions, spans, valid, routing, cache)
        context = self.context(ids, positions, spans, valid, cache, coming)
        if cache is not None:
            cache.begin(context)
        x, routings = self.embed_tokens(ids, valid, cache), []
        with self.autocast():
            for layer in range(self.config.n_layer):
                x, decision = self.layer(layer, x, task, context, routing, cache)
                routings.append(decision)
            logits = self.head(self.norm(x))
        if cache is not None:
            cache.end(context)
        return Output(logits, routings)

    def autocast(self):
        """The context of self.precision. Around several forwards it casts the weights once for all of them."""
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(self.embed.weight.device.type, torch.bfloat16)

    def embed_tokens(self, ids: Tensor, valid: Tensor | None = None, cache=None) -> Tensor:
        """ids (B, T) -> x (B, T, D); the n-th image token of a picture also gets learned position n, if any.

        A cache counts the image tokens on.
        """
        x = self.embed(ids)
        if self.image_position is None:
            return x
        image = ids >= self.config.image_start if valid is None else (ids >= self.config.image_start) & valid
        count = image.long().cumsum(1) + (0 if cache is None else cache.n_image)             # (B, T)
        if cache is not None:
            cache.n_image = count[:, -1:]
        return x + self.image_position((count - 1).clamp(min=0) % self.config.image_positions) * image[..., None]

    def layer(self, layer: int, x: Tensor, task: str, context: Context, rule: str, cache=None):
        """One layer for one task, the whole method: x_i <- x_i + g(r_i) f(x_S)_i for i in S, x_i otherwise."""
        keep, block = self.plan.keep[task][layer], self.blocks[layer]
        if keep == 0.0:
            return x, None
        if cache is not None:
            return self.cached_layer(layer, x, task, context, cache)
        if keep == 1.0:
            # a node of its own for the block's input: gradients add up in the routed order, equal to the last bit
            return x + block(x.view_as(x), context.rope, context.mask), None
        decision = self.router(layer, task)(x, task, keep, context, rule)
        indices, live = decision.indices, decision.live
        if indices.shape[1] == 0:                                                          # K rounds to nothing
            return x, decision
        places = flat(indices, x.shape[1])                                                 # (B, K) of (B T,)
        x_kept, rope = gather_tokens(x, places), gather_tokens(context.rope, places)       # (B, K, D), (B, K, 2, r)
        gate = GATES[self.config.gate](decision.scores.gather(1, indices))                 # (B, K)
        update = gate[..., None] * block(x_kept, rope, self.subset_mask(context, indices, live))
        if live is not None:
            update = update.masked_fill(~live[..., None], 0.0)                             # a spare slot writes nothing
        return add_tokens(x, places, update), decision

    def cached_layer(self, layer: int, x: Tensor, task: str, context: Context, cache):
        """The same behind a cache: the selected tokens alone, packed row by row to (1, N, D), whatever their number."""
        keep, own = self.plan.keep[task][layer], cache.layers[layer]
        decision, token = None, cache.valid_tokens
        if keep < 1.0:
            decision = self.router(layer, task)(x, task, keep, context, "causal", (cache.n_valid, own.counts))
            token = decision.selected.nonzero(as_tuple=True)                               # rows (N,), columns (N,)
        if len(token[0]) == 0:
            return x, decision
        everyone = len(token[0]) == x.shape[0] * x.shape[1]                                # then packing is a view

        def pack(y):                                                                       # (B, T, ..) -> (N, ..)
            return y.flatten(0, 1) if everyone else y[token]

        rows = cache.valid_rows if decision is None else token[0].tolist()
        own.begin(token[0], rows, pack(context.positions), None if context.spans is None else pack(context.spans),
                  single=x.shape[1] == 1)
        packed = pack(x)
        update = self.blocks[layer](packed[None], pack(context.rope)[None], None, own)[0]  # (N, D)
        if decision is not None:
            update = GATES[self.config.gate](pack(decision.scores))[:, None] * update
        new = (packed + update).to(x.dtype)
        return new.view_as(x) if everyone else x.index_put(token, new), decision

    def subset_mask(self, context: Context, indices: Tensor, live: Tensor | None) -> Tensor | None:
        """The mask of the kept tokens, from their own positions and spans. Spare slots sort last: causal hides them."""
        if context.ascending and context.spans is None:
            return None
        spans = None if context.spans is None else context.spans.gather(1, indices)
        return attention_mask(context.positions.gather(1, indices), spans, live)

    def context(self, ids, positions, spans, valid, cache=None, coming: int = 0) -> Context:
        """Positions (counted unless given), the mask of a dense layer, rotary angles and the order of ties."""
        counted = positions is None
        before = 0 if cache is None else cache.n_valid                       # valid tokens so far
        if cache is not None and valid is None:
            valid = torch.ones_like(ids, dtype=torch.bool)
        if counted:
            new = torch.ones_like(ids) if valid is None else valid.long()
            positions = (new.cumsum(1) - 1 + before).clamp(min=0)
        plain = cache is not None or (counted and valid is None and spans is None)
        mask = None if plain else attention_mask(positions, spans, valid)
        dtype = torch.promote_types(self.embed.weight.dtype, torch.float32)
        rope = rotary(positions, self.config.rope_dims, self.config.rope_theta, dtype)
        # a dense model ranks nothing, a cache without spans leaves every decision to predictors
        ranks = self.plan.routes and (cache is None or spans is not None)
        order = tie_order(*ids.shape, valid, ids.device, before) if ranks else None
        return Context(positions, spans, valid, order, rope, mask, counted, coming)

    def check(self, ids, task, positions, spans, valid, routing, cache) -> None:
        """Every error here is about the call, not about tensor values, except the id range on a CPU."""
        if task not in self.plan.tasks:
            raise ValueError(f"unknown task {task!r}: this model's plan knows {', '.join(self.plan.tasks)}")
        if routing not in ("topk", "predicted", "causal"):
            raise ValueError(f'routing must be "topk", "predicted" or "causal", got {routing!r}')
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.numel() == 0 or ids.dtype != torch.long:
            raise ValueError(f"ids must be (B, T) long with B, T >= 1, got {described(ids)}")
        if cache is not None:
            cache.check(self, ids, task, positions, routing)
        length = ids.shape[1] + (0 if cache is None else cache.length)
        if length > self.config.max_length:
            raise ValueError(f"{length} tokens, but max_length is {self.config.max_length}: shorten the sequence or "
                             "raise max_length in the config")
        for name, tensor, kind in (("positions", positions, "integers"), ("spans", spans, "integers"),
                                   ("valid", valid, "bool (pass mask != 0)")):
            fits = tensor is None or isinstance(tensor, Tensor) and tensor.shape == ids.shape and (
                tensor.dtype == torch.bool if name == "valid" else not tensor.is_floating_point())
            if not fits:
                raise ValueError(f"{name} must be {kind} of the shape of ids {tuple(ids.shape)}, got {described(tensor)}")
        if ids.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(f"ids lie in [{low}, {high}], the vocabulary is [0, {self.config.vocab_size})")

"""The unified transformer: one decoder for text and images, with the two backbones of the paper.

"showo": Phi-style (Show-o, arXiv 2408.12528): parallel blocks x + attn(LN x) + mlp(LN x),
         LayerNorm, GELU, biases, rotary on part of each head, LayerNorm on queries and keys,
         and image spans that see themselves in both directions.
"emu3":  Llama-style (Emu3, arXiv 2409.18869): RMSNorm, SwiGLU, grouped key/value heads, no biases,
         causal everywhere.

A `Plan` (plan.py) decides for each task and layer which tokens the block processes. Read
`UnifiedTransformer.layer`: it is the whole method. Departure from the usual: a block returns its
*update* u = attn + mlp without the residual, so that dense and routed layers are the same line,
x + g u, with g = 1 in a dense one.

Legend: B batch, T tokens, K kept tokens, D width, V vocabulary, H heads, G key/value heads, d head
width, N tokens of all rows packed into one.
"""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ModelConfig
from .plan import TASKS, Plan
from .routers import GATES, TaskRouter, add_tokens, flat, gather_tokens, tie_order

PRECISIONS = ("float32", "bf16")
RULES = ("topk", "predicted", "causal")                    # who decides which tokens are kept


# --- Who sees whom: one rule for every mask ---

def attention_mask(positions: Tensor, spans: Tensor | None, valid: Tensor | None) -> Tensor:
    """(B, 1, T, T) bool, True where query i may look at key j. A token always sees itself.

        j is valid  and  (pos_j <= pos_i  or  (span_i == span_j and span_i != 0))
    """
    see = positions[:, None, :] <= positions[:, :, None]                       # (B, T, T)
    if spans is not None:
        same = spans[:, None, :] == spans[:, :, None]
        see = see | (same & (spans != 0)[:, :, None])
    if valid is not None:
        itself = torch.eye(see.shape[-1], dtype=torch.bool, device=see.device)
        see = (see & valid[:, None, :]) | itself
    return see[:, None]


class Context(NamedTuple):
    """What every layer needs to know about the tokens, computed once a forward."""
    positions: Tensor              # (B, T)
    spans: Tensor | None           # (B, T), 0 = causal
    valid: Tensor | None           # (B, T) bool
    order: Tensor | None           # (B, T) order in which ties are broken
    rope: Tensor                   # (B, T, 2, rope_dims) cos and signed sin, see rotary
    mask: Tensor | None            # (B, 1, T, T); None: plain causal, the fast kernel
    ascending: bool                # positions ascend with the index: a sorted subset is causal too
    n_future: int                  # tokens that the finished sequence will have behind these


def rotary(positions: Tensor, dims: int, theta: float, dtype=torch.float32) -> Tensor:
    """(c, c) and (-s, s), cos and sin of position x theta^(-2 i / dims): (B, T, 2, dims)."""
    index = torch.arange(0, dims, 2, device=positions.device, dtype=dtype)
    angle = positions[..., None].to(dtype) * theta ** (-index / dims)          # (B, T, dims / 2)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)), dim=-2)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """(a, b) -> (a cos - b sin, b cos + a sin) = (a, b) (cos, cos) + (b, a) (-sin, sin).

    a and b: the halves of the rotated dims. x (B, T, H, d), rope (B, T, 2, r); dims past r stay.
    """
    r = rope.shape[-1]
    cos, sin = rope.to(x.dtype)[:, :, None].unbind(-2)                         # (B, T, 1, r)
    turned, rest = x[..., :r], x[..., r:]
    turned = turned * cos + turned.roll(r // 2, -1) * sin
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


# --- The block ---

EXPANDED = ("cuda",)   # devices where torch has no fast kernel for grouped keys under a mask


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False,
           dropout: float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(d) + mask) v: q (B, H, T, d), k and v (B, G, T', d) -> (B, H, T, d)."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and mask is not None and q.device.type in EXPANDED:
        k = k.repeat_interleave(groups, 1)
        v = v.repeat_interleave(groups, 1)
    grouped = q.shape[1] != k.shape[1]
    with torch.autocast(q.device.type, enabled=False):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal,
                                              dropout_p=dropout, enable_gqa=grouped)


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) w. CUDA has a kernel for it; on a CPU this form is faster."""

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda or x.dtype not in (torch.float32, torch.float64):
            return super().forward(x)
        mean_square = torch.linalg.vecdot(x, x)[..., None] / x.shape[-1]
        return x * (torch.rsqrt(mean_square + self.eps) * self.weight)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        D, d, bias = config.d_model, config.head_width, config.backbone == "showo"
        # three matrices: halves of one wide product would be copied together in every backward
        self.q = nn.Linear(D, config.n_head * d, bias=bias)
        self.k = nn.Linear(D, config.n_kv_head * d, bias=bias)
        self.v = nn.Linear(D, config.n_kv_head * d, bias=bias)
        self.out = nn.Linear(D, D, bias=bias)
        self.q_norm = nn.LayerNorm(d, eps=1e-5) if config.qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(d, eps=1e-5) if config.qk_norm else nn.Identity()

    def queries_keys_values(self, x: Tensor, rope: Tensor) -> tuple:
        """x (B, T, D) -> q (B, H, T, d), k and v (B, G, T, d), rotated."""
        heads = (-1, self.config.head_width)
        q = rotate(self.q_norm(self.q(x).unflatten(-1, heads)), rope)          # (B, T, H, d)
        k = rotate(self.k_norm(self.k(x).unflatten(-1, heads)), rope)          # (B, T, G, d)
        v = self.v(x).unflatten(-1, heads)
        dtype = v.dtype
        if x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            dtype = torch.float32                          # bf16 attention is slower on a CPU
        return tuple(t.to(dtype).transpose(1, 2) for t in (q, k, v))

    def forward(self, x: Tensor, rope: Tensor, mask: Tensor | None, attend_cached=None) -> Tensor:
        """attend_cached: function (q, k, v) -> y of a cache, in place of attention over x."""
        q, k, v = self.queries_keys_values(x, rope)
        if attend_cached is not None:
            y = attend_cached(q, k, v)
        else:
            dropout = self.config.attention_dropout if self.training else 0.0
            y = attend(q, k, v, mask, mask is None, dropout)
        return self.out(y.transpose(1, 2).reshape(x.shape))                    # (B, T, D)


class MLP(nn.Module):
    """GELU (tanh form) for showo; SwiGLU for emu3, silu(x W_gate) * (x W_up)."""

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

    def forward(self, x: Tensor, rope: Tensor, mask: Tensor | None, attend_cached=None) -> Tensor:
        normed = self.norm(x)
        a = self.attention(normed, rope, mask, attend_cached)
        if self.parallel:                                  # Phi:   u = attn(LN x) + mlp(LN x)
            return a + self.mlp(normed)
        return a + self.mlp(self.norm_mlp(x + a))          # Llama: u = a + mlp(norm(x + a))


# --- The model ---

class Output(NamedTuple):
    logits: Tensor                 # (B, T, V)
    routing: list                  # a Routing for each routed layer, None for the others


class UnifiedTransformer(nn.Module):
    """model(ids, task) -> Output. plan=None: every layer is dense, for every task.

    precision "bf16" runs matrix products in bf16 (autocast over the float32 weights), whoever
    calls the model. The residual stream, router scores and losses stay float32.
    """
    precision = "float32"          # one of PRECISIONS; copies, checkpoints and generation keep it

    def __init__(self, config: ModelConfig, plan: Plan | None = None):
        super().__init__()
        plan = plan or Plan.dense(config.n_layer, TASKS)
        if plan.n_layer != config.n_layer:
            raise ValueError(f"the plan has {plan.n_layer} layers, the model {config.n_layer}: "
                             "make one for this model")
        self.config, self.plan = config, plan
        D, V, showo = config.d_model, config.vocab_size, config.backbone == "showo"
        self.embed = nn.Embedding(V, D)
        n = config.image_positions
        self.image_position = nn.Embedding(n, D) if n else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = (nn.LayerNorm if showo else RMSNorm)(D, eps=1e-5)
        self.head = nn.Linear(D, V, bias=showo)
        self.apply(self.init_weights)
        for block in self.blocks:                          # residual outputs start small (GPT-2)
            for linear in (block.attention.out, block.mlp.down):
                nn.init.normal_(linear.weight, std=0.02 / (2 * config.n_layer) ** 0.5)
        self.routers = nn.ModuleList(self.make_routers(n) for n in range(config.n_layer))

    @staticmethod
    def init_weights(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def make_routers(self, layer: int) -> nn.ModuleDict:
        """A TaskRouter for each task that this layer routes, or one for all under "shared"."""
        D, hidden = self.config.d_model, self.config.predictor_hidden
        tasks = self.plan.routed(layer)
        if tasks and self.plan.shared_router:
            return nn.ModuleDict({"shared": TaskRouter(D, hidden, tasks)})
        return nn.ModuleDict({task: TaskRouter(D, hidden, [task]) for task in tasks})

    def router(self, layer: int, task: str) -> TaskRouter:
        return self.routers[layer]["shared" if self.plan.shared_router else task]

    def with_plan(self, plan: Plan | None, **changes) -> "UnifiedTransformer":
        """A copy under this plan (None: dense) with fresh routers and this model's other weights.

        changes: fields of the config that change no weight.
        """
        weight = self.embed.weight
        copy = UnifiedTransformer(replace(self.config, **changes), plan)
        copy.to(weight.device, weight.dtype).train(self.training)
        copy.precision = self.precision
        weights = copy.state_dict()                        # its own routers
        for name, weight in self.state_dict().items():
            if not name.startswith("routers."):
                weights[name] = weight
        copy.load_state_dict(weights)
        return copy

    def forward(self, ids: Tensor, task: str = "t2i", positions: Tensor | None = None,
                spans: Tensor | None = None, valid: Tensor | None = None, routing: str = "topk",
                cache=None, n_future: int = 0) -> Output:
        """ids (B, T) long -> logits (B, T, V) and what every layer decided.

        positions, spans (B, T) long, valid (B, T) bool. Positions default to counting the valid
        tokens; spans None: causal everywhere; a span id belongs to one run of tokens.
        routing: "topk" (training, looks at the whole sequence), "predicted" (the same, ranked by
        the predictors: objectives.training_rule) or "causal" (inference, looks at no later token;
        thresholds by predictor.calibrate). cache: see cache.py. n_future: routers.select_topk.
        ValueError for an unknown task or rule, shapes that do not fit, ids out of range (on a CPU).
        """
        self.check_call(ids, task, positions, spans, valid, routing)
        if cache is not None:
            cache.check_call(self, ids, task, positions, routing)
        context = self.context(ids, positions, spans, valid, cache, n_future)
        n_image = 0 if cache is None else cache.n_image
        if cache is not None:
            cache.begin_chunk(context)
        x = self.embed_tokens(ids, valid, n_image)
        decisions = []
        with self.autocast():
            for layer in range(self.config.n_layer):
                x, decision = self.layer(layer, x, task, context, routing, cache)
                decisions.append(decision)
            logits = self.head(self.norm(x))
        if cache is not None:
            cache.end_chunk(context, self.image_tokens(ids, valid))
        return Output(logits, decisions)

    def layer(self, layer: int, x: Tensor, task: str, context: Context, rule: str, cache=None):
        """One layer for one task, the whole method:

            x_i <- x_i + g(r_i) f(x_S)_i   for i in S,   x_i otherwise
        """
        keep, block = self.plan.keep[task][layer], self.blocks[layer]
        if keep == 0.0:
            return x, None
        if cache is not None:
            return self.cached_layer(layer, x, task, context, cache)
        if keep == 1.0:
            # a node of its own for the block's input: gradients add up in the routed order, so
            # that dense and routed training agree to the last bit
            return x + block(x.view_as(x), context.rope, context.mask), None
        decision = self.router(layer, task)(x, task, keep, context, rule)
        indices, live = decision.indices, decision.live    # S and its used slots             (B, K)
        if indices.shape[1] == 0:                          # K rounds to nothing
            return x, decision
        places = flat(indices, x.shape[1])
        x_kept = gather_tokens(x, places)                  # x_S                           (B, K, D)
        rope = gather_tokens(context.rope, places)         # they keep their positions
        mask = self.subset_mask(context, indices, live)
        gate = GATES[self.config.gate](decision.scores.gather(1, indices))             # g(r) (B, K)
        update = gate[..., None] * block(x_kept, rope, mask)                           # (B, K, D)
        if live is not None:
            update = update.masked_fill(~live[..., None], 0.0)     # a spare slot writes nothing
        return add_tokens(x, places, update), decision

    def cached_layer(self, layer: int, x: Tensor, task: str, context: Context, cache):
        """The same behind a cache: the selected tokens alone, packed row by row to (1, N, D)."""
        keep, own = self.plan.keep[task][layer], cache.layers[layer]
        decision, tokens, rows = None, cache.valid_tokens, cache.valid_rows
        if keep < 1.0:
            earlier = (cache.n_valid, own.counts)
            decision = self.router(layer, task)(x, task, keep, context, "causal", earlier)
            tokens = decision.selected.nonzero(as_tuple=True)                  # (N,), (N,)
            rows = tokens[0].tolist()
        if not rows:
            return x, decision
        everyone = len(rows) == x.shape[0] * x.shape[1]

        def pack(y: Tensor) -> Tensor:                     # (B, T, ..) -> (N, ..), a view for all
            return y.flatten(0, 1) if everyone else y[tokens]

        new = own.new_tokens(tokens[0], rows, context, pack)
        packed = pack(x)
        attend_cached = partial(own.attend, new)
        update = self.blocks[layer](packed[None], pack(context.rope)[None], None, attend_cached)[0]
        if decision is not None:
            gate = GATES[self.config.gate](pack(decision.scores))                      # (N,)
            update = gate[:, None] * update                                            # (N, D)
        packed = (packed + update).to(x.dtype)
        return packed.view_as(x) if everyone else x.index_put(tokens, packed), decision

    def autocast(self):
        """The context of self.precision. Around several forwards, it casts the weights once."""
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(self.embed.weight.device.type, torch.bfloat16)

    def image_tokens(self, ids: Tensor, valid: Tensor | None) -> Tensor:
        """(B, T) bool: the image codes among the ids."""
        image = ids >= self.config.image_start
        return image if valid is None else image & valid

    def embed_tokens(self, ids: Tensor, valid: Tensor | None = None,
                     n_image: Tensor | int = 0) -> Tensor:
        """ids (B, T) -> x (B, T, D); the n-th image token also gets learned position n, if any.

        n_image: (B, 1), the image tokens of earlier chunks.
        """
        x = self.embed(ids)
        if self.image_position is None:
            return x
        image = self.image_tokens(ids, valid)
        index = (image.long().cumsum(1) + n_image - 1).clamp(min=0)                    # (B, T)
        position = self.image_position(index % self.config.image_positions)
        return x + position * image[..., None]

    def subset_mask(self, context: Context, indices: Tensor, live: Tensor | None) -> Tensor | None:
        """The mask of the kept tokens, from their own positions and spans.

        None is plain causal, which hides the spare slots too: they sort last.
        """
        if context.ascending and context.spans is None:
            return None
        spans = None if context.spans is None else context.spans.gather(1, indices)
        return attention_mask(context.positions.gather(1, indices), spans, live)

    def context(self, ids: Tensor, positions: Tensor | None = None, spans: Tensor | None = None,
                valid: Tensor | None = None, cache=None, n_future: int = 0) -> Context:
        """Positions, the mask of a dense layer, rotary angles and the order of ties."""
        n_earlier = 0 if cache is None else cache.n_valid
        if cache is not None and valid is None:
            valid = torch.ones_like(ids, dtype=torch.bool)
        ascending = positions is None
        if ascending:                                      # position = valid tokens before
            new = torch.ones_like(ids) if valid is None else valid.long()
            positions = (new.cumsum(1) - 1 + n_earlier).clamp(min=0)
        mask = None
        if cache is None and not (ascending and valid is None and spans is None):
            mask = attention_mask(positions, spans, valid)
        dtype = torch.promote_types(self.embed.weight.dtype, torch.float32)
        rope = rotary(positions, self.config.rope_dims, self.config.rope_theta, dtype)
        order = None
        if self.plan.routes and (cache is None or spans is not None):      # who ranks tokens?
            order = tie_order(*ids.shape, valid, ids.device, n_earlier)
        return Context(positions, spans, valid, order, rope, mask, ascending, n_future)

    def check_call(self, ids, task: str, positions=None, spans=None, valid=None,
                   routing: str = "topk") -> None:
        """ValueError for a call that cannot be right. Reads no tensor's values but on a CPU."""
        if task not in self.plan.tasks:
            raise ValueError(f"unknown task {task!r}: this model's plan knows "
                             f"{', '.join(self.plan.tasks)}")
        if routing not in RULES:
            raise ValueError(f"routing must be one of {', '.join(RULES)}, got {routing!r}")
        if ids.dim() != 2 or ids.numel() == 0 or ids.dtype != torch.long:
            raise ValueError(f"ids must be (B, T) long with B, T >= 1, got {tuple(ids.shape)} "
                             f"{ids.dtype}")
        if ids.shape[1] > self.config.max_length:
            raise ValueError(f"{ids.shape[1]} tokens, but max_length is {self.config.max_length}: "
                             "shorten the sequence or raise max_length in the config")
        for name, tensor in (("positions", positions), ("spans", spans), ("valid", valid)):
            if tensor is not None and tensor.shape != ids.shape:
                raise ValueError(f"{name} must have the shape of ids {tuple(ids.shape)}, got "
                                 f"{tuple(tensor.shape)}")
        if valid is not None and valid.dtype != torch.bool:
            raise ValueError(f"valid must be bool (pass mask != 0), got {valid.dtype}")
        if ids.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(f"ids lie in [{low}, {high}], the vocabulary is "
                                 f"[0, {self.config.vocab_size})")

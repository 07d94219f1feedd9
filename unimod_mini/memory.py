"""Memory of a plan: parameters, activations kept for the backward pass, key/value cache. No model is built.

Activations are what autograd holds after a forward in float32 on a CPU (checked with torch 2.13; fused norms of a GPU
keep less), each storage once, ids included, parameters, logits and loss apart; eager mode, no autocast, no dropout.
Attention is the fused kernel: no n x n scores are kept, but a mask is, in every layer. In floats, of n tokens:

    norm               input D, output D, 2 statistics (LayerNorm); input, its factors and output 3 D, 1 (RMSNorm)
    QK norm            queries and keys before it (H + G) d, 2 (H + G) statistics
    attention          rotated queries and keys (H + G) d, values G d, output D, log-sum-exp H; with a mask n, its row
                       in float32
    MLP                before and after GELU 2 F; SwiGLU 4 F: gate and up, silu(gate), their product
    routed layer       x itself T D, scores T, predictor 2 T h; u K D, gates

Legend: T tokens, K slots, D width, d head width, H heads, G key/value heads, F, h hidden widths of MLP, predictor.
"""

from typing import NamedTuple

from .config import ModelConfig
from .plan import Plan, capacity

FLOAT, INDEX = 4, 8        # bytes of a float32 and of an index


class Bytes(NamedTuple):
    total: int
    by_layer: list     # one int a layer


def keep_ratios(config: ModelConfig, plan: Plan | None, task: str) -> tuple:
    """The keep of every layer; plan None: dense. ValueError for a task that the plan lacks, a plan of another depth."""
    plan = Plan.dense(config.n_layer, (task,)) if plan is None else plan
    if task not in plan.tasks or plan.n_layer != config.n_layer:
        raise ValueError(f"the plan has tasks {plan.tasks} and {plan.n_layer} layers, asked for {task!r} and "
                         f"{config.n_layer}")
    return plan.keep[task]


def count_parameters(config: ModelConfig, plan: Plan | None = None) -> int:
    """Numbers that training moves, routers and predictors of the plan included."""
    D, F, V, h, d = config.d_model, config.d_ff, config.vocab_size, config.predictor_hidden, config.head_width
    qkv, showo = (config.n_head + 2 * config.n_kv_head) * d, config.backbone == "showo"
    block = D * qkv + D * D + (2 if showo else 3) * D * F + (4 * d if config.qk_norm else 0) + 2 * D
    if showo:
        block += qkv + D + F + D                                                   # biases of the four matrices
    ends = V * D + config.image_positions * D + D + V * D + (D + V if showo else 0)
    router = D + 1 + (D * h + h + h + 1 if h else 0)
    tasks = [len(plan.routed(layer)) for layer in range(plan.n_layer)] if plan is not None else []
    routers = sum(min(n, 1) if plan.shared_router else n for n in tasks)
    return config.n_layer * block + ends + routers * router


def block_activations(config: ModelConfig, n: int, masked: bool) -> int:
    """Bytes kept by one block over n tokens, its input included, the rotary angles apart."""
    D, d, H, G = config.d_model, config.head_width, config.n_head, config.n_kv_head
    showo = config.backbone == "showo"
    norms = 2 * D + 2 if showo else 2 * (3 * D + 1)                                # emu3 has two
    attention = (H + 2 * G) * d + D + H + ((H + G) * (d + 2) if config.qk_norm else 0)
    mlp = 2 * config.d_ff if showo else 4 * config.d_ff
    return FLOAT * n * (norms + attention + mlp + (n if masked else 0))


def layer_activations(config: ModelConfig, keep: float, T: int, spans: bool, padded: bool) -> int:
    """Bytes kept by one layer."""
    if keep in (0.0, 1.0):
        return block_activations(config, T, spans or padded) if keep else 0
    K, D = capacity(keep, T), config.d_model
    predictor = FLOAT * 2 * T * config.predictor_hidden
    if K == 0:                                             # x is the next layer's input too, counted there
        return predictor
    scores = FLOAT * (T * D + T) + predictor               # x, and r, from which K are gathered
    gate = FLOAT * K * (D + 1 + (config.gate != "linear"))                         # u, g, and tanh or sigmoid
    # slots (with padding a view of all T), their places in the batch to gather and to add, live
    indices = INDEX * ((T if padded else K) + K) + (K if padded else 0)
    angles = FLOAT * K * 2 * config.rope_dims
    return scores + gate + indices + angles + block_activations(config, K, spans)


def activation_bytes(config: ModelConfig, plan: Plan | None, task: str, length: int, spans: bool = False,
                     padded: bool = False) -> Bytes:
    """What one sequence keeps for its backward pass; spans, padded: does the call give spans, validity?

    A dense layer has an n x n mask with either, a routed one with spans alone: sorted tokens are causal.
    """
    keeps = keep_ratios(config, plan, task)
    layers = [layer_activations(config, keep, length, spans, padded) for keep in keeps]
    image = length * (INDEX + 1) if config.image_positions else 0                  # positions, and which are images
    angles = FLOAT * length * 2 * config.rope_dims if 1.0 in keeps else 0              # one tensor for all dense layers
    final = 2 * config.d_model + 2 if config.backbone == "showo" else 3 * config.d_model + 1
    return Bytes(sum(layers) + INDEX * length + image + angles + FLOAT * length * final, layers)


def cache_bytes(config: ModelConfig, plan: Plan | None, task: str, length: int, element: int = FLOAT,
                routed: list | None = None) -> Bytes:
    """Keys, values and positions of the routed tokens of one row: (2 G d) x element + 4 bytes a token and layer.

    routed: tokens that each layer kept, by default the plan's K. element: 4 for float32, 2 for bfloat16.
    Cache.nbytes(used=True) is the same count; more is allocated, in advance.
    """
    keeps = keep_ratios(config, plan, task)
    routed = [capacity(keep, length) for keep in keeps] if routed is None else routed
    token = 2 * config.n_kv_head * config.head_width * element + 4
    return Bytes(token * sum(routed), [token * n for n in routed])

"""Sizes of a model: `ModelConfig`, and presets from the toys to the true sizes of Show-o and Emu3.

The two backbones are those of transformer.py. Sources of the true sizes: showlab/Show-o (Phi-1.5 with QK norm), and
baaivision/Emu3 (emu3/mllm/configuration_emu3.py).
"""

import math
import operator
from dataclasses import dataclass

from .routers import GATES, MEMBERSHIP_WEIGHT


@dataclass(frozen=True)
class ModelConfig:
    backbone: str                  # "showo" (Phi-style) or "emu3" (Llama-style)
    n_layer: int
    n_head: int
    n_kv_head: int                 # < n_head: grouped-query attention
    d_model: int
    d_ff: int
    vocab_size: int
    max_length: int
    image_start: int               # first id of the image codes; ids from here on are image tokens
    rope_theta: float = 1e4
    rope_fraction: float = 1.0     # share of each head that is rotated
    qk_norm: bool = False          # LayerNorm over each head of queries and keys, before the rotary
    attention_dropout: float = 0.0
    image_positions: int = 0       # > 0: a learned position for each of that many image tokens; 0 in the true sizes
    gate: str = "tanh"             # routers.GATES
    membership: str = "predictor"  # who decides causally: a "predictor" beside the router, or the "router" itself
    predictor_width: int = 0       # hidden width of the predictor, 0: d_model / 4

    def __post_init__(self):
        if self.backbone not in ("showo", "emu3"):
            raise ValueError(f"ModelConfig: backbone must be showo or emu3, got {self.backbone!r}")
        if self.gate not in GATES:
            raise ValueError(f"ModelConfig: gate must be one of {', '.join(GATES)}, got {self.gate!r}")
        if self.membership not in MEMBERSHIP_WEIGHT:
            raise ValueError(f"ModelConfig: membership must be one of {', '.join(MEMBERSHIP_WEIGHT)}, got "
                             f"{self.membership!r}")
        least = dict.fromkeys(("n_layer", "n_head", "n_kv_head", "d_model", "d_ff", "vocab_size", "max_length"), 1)
        least |= dict.fromkeys(("image_start", "image_positions", "predictor_width"), 0)
        for name in least:                                 # numpy's integers, say, become Python's
            if hasattr(getattr(self, name), "__index__"):
                object.__setattr__(self, name, operator.index(getattr(self, name)))
        if bad := {name: getattr(self, name) for name, low in least.items()
                   if not isinstance(getattr(self, name), int) or getattr(self, name) < low}:
            raise ValueError("ModelConfig: sizes must be whole numbers of at least 1 (image_start, image_positions and "
                             f"predictor_width: 0), got {bad}")
        if not (0 <= self.rope_fraction <= 1 and 0 <= self.attention_dropout < 1):
            raise ValueError(f"ModelConfig: rope_fraction must lie in [0, 1] and attention_dropout in [0, 1), got "
                             f"{self.rope_fraction}, {self.attention_dropout}")
        if self.d_model % self.n_head or self.n_head % self.n_kv_head:
            raise ValueError(f"ModelConfig: n_head={self.n_head} must divide d_model={self.d_model} and be a multiple "
                             f"of n_kv_head={self.n_kv_head}")
        if not 0 < self.rope_theta < math.inf:
            raise ValueError(f"ModelConfig: rope_theta must be finite and above 0, got {self.rope_theta}")
        if self.rope_dims % 2:
            raise ValueError(f"ModelConfig: {self.rope_dims} rotated dims a head, an even number is needed")

    @property
    def head_width(self) -> int:
        return self.d_model // self.n_head

    @property
    def rope_dims(self) -> int:
        return int(self.head_width * self.rope_fraction)

    @property
    def predictor_hidden(self) -> int:
        """Hidden width of the predictor; 0: there is none, the router itself decides."""
        return 0 if self.membership == "router" else self.predictor_width or max(self.d_model // 4, 1)

    @classmethod
    def preset(cls, name: str) -> "ModelConfig":
        """toy-showo, toy-emu3 (minutes on a laptop), showo-1.3b, emu3-8b (the true shapes)."""
        if name not in PRESETS:
            raise ValueError(f"ModelConfig.preset: unknown {name!r}, the presets are {', '.join(PRESETS)}")
        return PRESETS[name]


PRESETS = {
    "toy-showo": ModelConfig("showo", 8, 4, 4, 128, 512, 126, 128, image_start=52, rope_fraction=0.5,
                             qk_norm=True, image_positions=16),
    "toy-emu3": ModelConfig("emu3", 8, 4, 2, 128, 384, 121, 128, image_start=48, rope_theta=1e6,
                            qk_norm=True, image_positions=16),
    "showo-1.3b": ModelConfig("showo", 24, 32, 32, 2048, 8192, 58498, 2048, image_start=50305, rope_fraction=0.5,
                              qk_norm=True),
    "emu3-8b": ModelConfig("emu3", 32, 32, 8, 4096, 14336, 184622, 9216, image_start=151854, rope_theta=1e6,
                           attention_dropout=0.1),
}

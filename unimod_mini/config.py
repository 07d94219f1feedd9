"""Sizes of a model: `ModelConfig`, and presets from the toys to the true sizes of Show-o and Emu3.

The two backbones are those of transformer.py. Sources of the true sizes: showlab/Show-o (Phi-1.5
with QK norm), and baaivision/Emu3 (emu3/mllm/configuration_emu3.py).
"""

from dataclasses import dataclass
from numbers import Integral

from .routers import GATES, MEMBERSHIP_WEIGHT

BACKBONES = ("showo", "emu3")


@dataclass(frozen=True)
class ModelConfig:
    """ValueError for a name that is unknown and for sizes that do not fit together."""

    backbone: str                  # "showo" (Phi-style) or "emu3" (Llama-style)
    n_layer: int
    n_head: int
    n_kv_head: int                 # < n_head: grouped-query attention
    d_model: int
    d_ff: int
    vocab_size: int
    max_length: int
    image_start: int               # first id of the image codes; all ids from here on are images
    rope_theta: float = 1e4
    rope_fraction: float = 1.0     # share of each head that is rotated
    qk_norm: bool = False          # LayerNorm on each head of queries and keys, before the rotary
    attention_dropout: float = 0.0
    image_positions: int = 0       # > 0: a learned position for that many image tokens (toys)
    gate: str = "tanh"             # routers.GATES
    membership: str = "predictor"  # who decides causally: a "predictor", or the "router" itself
    predictor_width: int = 0       # hidden width of the predictor, 0: d_model / 4

    def __post_init__(self):
        for name, known in (("backbone", BACKBONES), ("gate", tuple(GATES)),
                            ("membership", tuple(MEMBERSHIP_WEIGHT))):
            if getattr(self, name) not in known:
                raise ValueError(f"ModelConfig: {name} must be one of {', '.join(known)}, got "
                                 f"{getattr(self, name)!r}")
        for name in ("n_layer", "n_head", "n_kv_head", "d_model", "d_ff", "vocab_size",
                     "max_length"):
            value = getattr(self, name)
            if not isinstance(value, Integral) or value < 1:
                raise ValueError(f"ModelConfig: {name} must be a whole number of at least 1, got "
                                 f"{value!r}")
        if self.d_model % self.n_head or self.n_head % self.n_kv_head:
            raise ValueError(f"ModelConfig: n_head={self.n_head} must divide d_model="
                             f"{self.d_model} and be a multiple of n_kv_head={self.n_kv_head}")
        if not 0 <= self.rope_fraction <= 1 or self.rope_dims % 2:
            raise ValueError(f"ModelConfig: rope_fraction={self.rope_fraction} must lie in [0, 1] "
                             f"and rotate an even number of dims a head, not {self.rope_dims}")

    @property
    def head_width(self) -> int:
        return self.d_model // self.n_head

    @property
    def rope_dims(self) -> int:
        return int(self.head_width * self.rope_fraction)

    @property
    def predictor_hidden(self) -> int:
        """Hidden width of the predictor; 0: there is none, the router itself decides."""
        if self.membership == "router":
            return 0
        return self.predictor_width or max(self.d_model // 4, 1)

    @classmethod
    def preset(cls, name: str) -> "ModelConfig":
        """toy-showo, toy-emu3 (minutes on a laptop), showo-1.3b, emu3-8b (the true shapes)."""
        if name not in PRESETS:
            raise ValueError(f"ModelConfig.preset: unknown {name!r}, the presets are "
                             f"{', '.join(PRESETS)}")
        return PRESETS[name]


PRESETS = {
    "toy-showo": ModelConfig(
        "showo", n_layer=8, n_head=4, n_kv_head=4, d_model=128, d_ff=512, vocab_size=126,
        max_length=128, image_start=52, rope_fraction=0.5, qk_norm=True, image_positions=16),
    "toy-emu3": ModelConfig(
        "emu3", n_layer=8, n_head=4, n_kv_head=2, d_model=128, d_ff=384, vocab_size=121,
        max_length=128, image_start=48, rope_theta=1e6, qk_norm=True, image_positions=16),
    "showo-1.3b": ModelConfig(
        "showo", n_layer=24, n_head=32, n_kv_head=32, d_model=2048, d_ff=8192, vocab_size=58498,
        max_length=2048, image_start=50305, rope_fraction=0.5, qk_norm=True),
    "emu3-8b": ModelConfig(
        "emu3", n_layer=32, n_head=32, n_kv_head=8, d_model=4096, d_ff=14336, vocab_size=184622,
        max_length=9216, image_start=151854, rope_theta=1e6, attention_dropout=0.1),
}

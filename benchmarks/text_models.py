"""Hugging Face's text models at the shape of a config, behind the interface that our training step
asks for.

showo: Phi (parallel blocks, rotary on part of each head, QK norm); emu3: Llama (RMSNorm, SwiGLU,
grouped heads). Needs the optional transformers. Both run causal text: they know no image spans.
Phi's own GELU is replaced by torch's fused one, the same function, so that the comparison is with
the faster of its forms.
"""

import torch
from torch import Tensor, nn

from unimod_mini import ModelConfig
from unimod_mini.transformer import Output


def hugging_face(config: ModelConfig) -> nn.Module:
    """PhiForCausalLM or LlamaForCausalLM with random weights, as many parameters as our dense
    model.
    """
    try:
        import transformers as hf
    except ImportError as error:
        raise ImportError(f'{error}; --against-hf needs the extra hf: pip install -e ".[hf]"') from None
    shape = dict(vocab_size=config.vocab_size, hidden_size=config.d_model, intermediate_size=config.d_ff,
                 num_hidden_layers=config.n_layer, num_attention_heads=config.n_head,
                 num_key_value_heads=config.n_kv_head, max_position_embeddings=config.max_length, use_cache=False,
                 rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta,
                                  "partial_rotary_factor": config.rope_fraction},
                 tie_word_embeddings=False, attn_implementation="sdpa")
    if config.backbone == "showo":
        return hf.PhiForCausalLM(hf.PhiConfig(**shape, hidden_act="gelu_pytorch_tanh", qk_layernorm=config.qk_norm))
    return hf.LlamaForCausalLM(hf.LlamaConfig(**shape, rms_norm_eps=1e-5))


class TextModel(nn.Module):
    """model(ids, task) -> Output, as UnifiedTransformer, its `precision` too.

    A dense model: no routings.
    """
    precision = "float32"

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, self.model = config, hugging_face(config)
        self.name = type(self.model).__name__

    def forward(self, ids: Tensor, task: str = "t2i", spans=None, valid=None, routing: str = "topk") -> Output:
        if spans is not None or valid is not None:
            raise ValueError("a text model knows neither spans nor padding")
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return Output(self.model(input_ids=ids).logits, [])

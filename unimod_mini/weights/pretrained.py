"""Hugging Face checkpoints of Phi, Show-o, Llama and Emu3 (whose weights have Llama's names).

    model = load_pretrained("folder")    # dense: layer_switch -> model.with_plan(plan) -> train
    save_pretrained(model, "another")    # transformers reads the dense model from it, we the routed

What Hugging Face has no name for (plan, routers, predictors, thresholds) lies beside its files, in
unimod.json and unimod.safetensors. Names that differ stand once, in NAMES and FIELDS, and serve
both directions. A config that this code cannot compute is refused, never approximated.

Sources: transformers 5.24 (models/phi, llama, emu3), showlab/Show-o (models/modeling_showo.py,
phi.py), baaivision/Emu3 (emu3/mllm/configuration_emu3.py).
Legend: ours, our state dict and ModelConfig; theirs, Hugging Face's.
"""

import json
import re
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..atomic_files import as_plain_data, json_text, whole_file
from ..config import PRESETS, ModelConfig
from ..plan import Plan
from ..inference import WRAPPERS, unwrapped
from ..transformer import UnifiedTransformer

# --- Two vocabularies ---

# modules, ours: theirs; N is blocks.0 and model.layers.0 ..; weight and bias have one name
BOTH = {"embed": "model.embed_tokens", "head": "lm_head", "N.norm": "N.input_layernorm",
        "N.attention.q": "N.self_attn.q_proj", "N.attention.k": "N.self_attn.k_proj",
        "N.attention.v": "N.self_attn.v_proj"}
NAMES = {
    "showo": BOTH | {
        "norm": "model.final_layernorm", "N.attention.out": "N.self_attn.dense",
        "N.attention.q_norm": "N.self_attn.q_layernorm", "N.mlp.up": "N.mlp.fc1",
        "N.attention.k_norm": "N.self_attn.k_layernorm", "N.mlp.down": "N.mlp.fc2"},
    "emu3": BOTH | {
        "norm": "model.norm", "N.attention.out": "N.self_attn.o_proj",
        "N.norm_mlp": "N.post_attention_layernorm", "N.mlp.gate": "N.mlp.gate_proj",
        "N.mlp.up": "N.mlp.up_proj", "N.mlp.down": "N.mlp.down_proj"}}
# a language model inside of Show-o; of Emu3ForConditionalGeneration, on disk and in memory
NESTED = re.compile(r"^showo\.|^text_model\.(?=model\.|lm_head\.)|(?<=^model\.)text_model\.")
# Emu3's image tokenizer, and a constant
IGNORED = re.compile(r"^(model\.)?vqmodel\.|\.rotary_emb\.inv_freq$")

# ModelConfig: config.json, whose rotary fields lie at its top or in rope_parameters
FIELDS = {
    "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads", "d_model": "hidden_size", "d_ff": "intermediate_size",
    "vocab_size": "vocab_size", "max_length": "max_position_embeddings",
    "attention_dropout": "attention_dropout", "rope_theta": "rope_theta",
    "rope_fraction": "partial_rotary_factor", "qk_norm": "qk_layernorm"}
OUR_FIELDS = ("image_start", "gate", "membership", "predictor_width")  # in unimod.json
ARCHITECTURES = {"showo": ("phi", "PhiForCausalLM"), "emu3": ("llama", "LlamaForCausalLM")}

# What a field must be if it is set, in both directions. The first value is what we write; None is
# not written. image_positions is ours: Hugging Face has none.
ANY = {"tie_word_embeddings": (False,), "rope_type": (None, "default"), "type": (None, "default"),
       "sliding_window": (None,), "quantization_config": (None,), "image_positions": (None, 0)}
SUPPORTED = {
    "showo": ANY | {"hidden_act": ("gelu_pytorch_tanh", "gelu_new"), "layer_norm_eps": (1e-5,)},
    "emu3": ANY | {"hidden_act": ("silu",), "rms_norm_eps": (1e-5,), "attention_bias": (False,),
                   "mlp_bias": (False,), "partial_rotary_factor": (1.0,), "qk_layernorm": (False,)}}

# model_type: our backbone, and what an absent field means. Emu3Config's defaults are Emu3's sizes.
LLAMA = {"rope_theta": 1e4, "partial_rotary_factor": 1.0, "qk_layernorm": False,
         "attention_dropout": 0.0, "rms_norm_eps": 1e-6}
EMU3 = {theirs: getattr(PRESETS["emu3-8b"], ours) for ours, theirs in FIELDS.items()}
MODEL_TYPES = {
    "phi": ("showo", LLAMA | {"partial_rotary_factor": 0.5}), "llama": ("emu3", LLAMA),
    "emu3_text_model": ("emu3", EMU3), "Emu3": ("emu3", EMU3)}  # the last: of baaivision/Emu3


def their_names(model: UnifiedTransformer) -> dict:
    """{theirs: ours} for the whole state dict; routers, which they lack, keep our names."""
    modules = {}
    for n in range(model.config.n_layer):
        for ours, theirs in NAMES[model.config.backbone].items():
            modules[ours.replace("N", f"blocks.{n}")] = theirs.replace("N", f"model.layers.{n}")
    names = {}
    for ours in model.state_dict():
        module, _, kind = ours.rpartition(".")
        names[f"{modules.get(module, module)}.{kind}"] = ours
    return names


# --- config.json ---

def check_supported(backbone: str, given: dict, **more) -> None:
    """ValueError for a field with another value than those of SUPPORTED and `more`."""
    for field, values in (SUPPORTED[backbone] | more).items():
        if given.get(field) not in (None, *values):
            raise ValueError(f"{field} is {given[field]!r}, supported: "
                             + " or ".join(map(repr, values)))


def config_to_hf(config: ModelConfig) -> dict:
    """The fields of config.json. ValueError names one that Hugging Face cannot express."""
    model_type, architecture = ARCHITECTURES[config.backbone]
    fields = {theirs: getattr(config, ours) for ours, theirs in FIELDS.items()}
    check_supported(config.backbone, fields | {"image_positions": config.image_positions})
    supported = SUPPORTED[config.backbone].items()
    fixed = {field: values[0] for field, values in supported if values[0] is not None}
    rope = {field: fields[field] for field in ("rope_theta", "partial_rotary_factor")}
    return {"architectures": [architecture], "model_type": model_type, "bos_token_id": None,
            "eos_token_id": None, **fixed, **fields,
            "rope_parameters": {"rope_type": "default", **rope}}


def config_from_hf(config: dict) -> ModelConfig:
    """config.json -> ModelConfig. ValueError for a missing or unsupported field.

    Of dropouts attention_dropout is kept; Phi's resid_pdrop and embd_pdrop and those of Emu3's
    residual branches are not.
    """
    if "llm_vocab_size" in config:
        return showo_config(config)
    kind = config.get("model_type")
    if kind == "emu3":  # Emu3ForConditionalGeneration, a language model inside
        language_model = config.get("text_config") or {}
        return config_from_hf(config | language_model | {"model_type": "emu3_text_model"})
    if kind not in MODEL_TYPES:
        raise ValueError(f"model_type is {kind!r}, supported: {', '.join(MODEL_TYPES)}, emu3, and "
                         "Show-o's config.json")
    backbone, absent = MODEL_TYPES[kind]
    given = absent | config
    for rope in ("rope_scaling", "rope_parameters"):  # the field of old and of new versions
        given |= config.get(rope) or {}
    if given.get("num_key_value_heads") is None:
        given["num_key_value_heads"] = given.get("num_attention_heads")
    missing = [theirs for theirs in FIELDS.values() if given.get(theirs) is None]
    if missing:
        raise ValueError(f"no {', '.join(missing)}")
    start = emu3_image_start(given) if absent is EMU3 else given["vocab_size"]
    sizes = {ours: given[theirs] for ours, theirs in FIELDS.items()}
    model = ModelConfig(backbone, image_start=start, **sizes)
    check_supported(backbone, given, head_dim=(model.head_width,))
    return model


def emu3_image_start(given: dict) -> int:
    """First id of the image codes: from vocabulary_map, else the last 32,768 ids, as published."""
    names = given.get("vocabulary_map") or {}
    ids = [names[name] for name in sorted(names) if name.startswith("<|visual token")]
    if ids and ids != list(range(ids[0], ids[0] + len(ids))):
        raise ValueError("vocabulary_map scatters the visual tokens, supported: ascending ids "
                         "without gaps")
    start = ids[0] if ids else given["vocab_size"] - 32768
    return start if start > 0 else given["vocab_size"]


def showo_config(config: dict) -> ModelConfig:
    """Show-o's config.json names Phi-1.5, not its sizes; its code switches QK norm on.

    Ids: text, special tokens, image codes, mask.
    """
    if config.get("w_clip_vit"):
        raise ValueError("w_clip_vit is true: its pictures are CLIP features, supported: false, "
                         "pictures as codes")
    start = config["llm_vocab_size"] + config.get("num_new_special_tokens", 10)
    vocabulary = start + config.get("codebook_size", 8192) + 1
    if config["vocab_size"] != vocabulary:
        raise ValueError(f"vocab_size is {config['vocab_size']}, supported: text, special, codes, "
                         f"mask: {vocabulary}")
    return replace(PRESETS["showo-1.3b"], vocab_size=vocabulary, image_start=start)


# --- Reading ---

WEIGHTS = ("model.safetensors", "pytorch_model.safetensors", "pytorch_model.bin")


def safetensors() -> tuple:
    """safe_open and save_file, of the optional package."""
    try:
        from safetensors import safe_open
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError(f"{error}; .safetensors files need it: pip install safetensors") from None
    return safe_open, save_file


@contextmanager
def reading(file: Path):
    """What the JSON file holds; errors of the block become a ValueError that names the file."""
    try:
        yield json.loads(file.read_text(encoding="utf-8"))
    except KeyError as error:
        raise ValueError(f"{file}: no {error}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: {error}") from None


def weight_files(folder: Path) -> list:
    """The file with the weights, or the parts that its index lists."""
    for name in WEIGHTS:
        index = folder / f"{name}.index.json"
        if (folder / name).exists():
            return [folder / name]
        if index.exists():
            with reading(index) as stored:
                parts = sorted(set(stored["weight_map"].values()))
                if not parts:
                    raise ValueError("weight_map is empty, expected the file of every weight")
                return [folder / part for part in parts]
    raise FileNotFoundError(f"{folder} has no weights: {', '.join(WEIGHTS)}, or an index of parts")


def tensors(file: Path):
    """(name, tensor) of one file, mapped: a page is read when it is used."""
    try:
        if ".safetensors" in file.suffixes:  # or .safetensors.tmp
            with safetensors()[0](file, "pt") as stored:
                for name in stored.keys():
                    yield name, stored.get_tensor(name)
        else:
            yield from torch.load(file, "cpu", mmap=True, weights_only=True).items()
    except (FileNotFoundError, ImportError):
        raise
    except Exception as error:  # torch's own text advises to load it unsafely
        raise ValueError(f"{file} is not a whole file of plain tensors (nor is a pointer of "
                         "git-lfs, or a .bin from before torch 1.6)") from error


def state_from(files: list, model: UnifiedTransformer, dtype) -> dict:
    """The state dict of `model`; ValueError unless every weight is there once, in its shape."""
    missing, wanted, state, wrong = their_names(model), model.state_dict(), {}, []
    for file in files:
        for key, tensor in tensors(file):
            if IGNORED.search(key):
                continue
            ours = missing.pop(NESTED.sub("", WRAPPERS.sub("", key)), None)
            if ours is None:
                wrong.append(f"{key} is unknown or there twice")
            elif not isinstance(tensor, Tensor):
                wrong.append(f"{key} is a {type(tensor).__name__} instead of a tensor")
            elif tensor.shape != wanted[ours].shape or not tensor.is_floating_point():
                wrong.append(f"{key} is {tuple(tensor.shape)} {tensor.dtype} instead of "
                             f"{tuple(wanted[ours].shape)}")
            else:
                state[ours] = tensor.to(dtype or tensor.dtype)
    wrong += [f"{theirs} is missing" for theirs in missing]
    if wrong:
        more = f"; and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise ValueError(f"{files[0].parent} does not fit its config: {'; '.join(wrong[:4])}{more}")
    return state


def pretrained_config(path) -> tuple[ModelConfig, Plan | None]:
    """The sizes in a folder, and its plan if it has one; errors as in load_pretrained."""
    folder, plan = Path(path), None
    if not folder.is_dir():
        raise FileNotFoundError(f"{path} is not a folder; fetch a checkpoint by: hf download NAME "
                                "--local-dir FOLDER")
    with reading(folder / "config.json") as stored:
        config = config_from_hf(stored)
    if (folder / "unimod.json").exists():
        with reading(folder / "unimod.json") as stored:
            plan = Plan(**stored.pop("plan"))
            config = replace(config, **stored)
            if plan.n_layer != config.n_layer:
                raise ValueError(f"the plan has {plan.n_layer} layers, the model {config.n_layer}")
    return config, plan


def load_pretrained(path, dtype: torch.dtype | None = None) -> UnifiedTransformer:
    """The model in a folder of Hugging Face or of save_pretrained, in eval mode on the CPU.

    It is dense unless the folder has a plan. dtype None keeps the file's (training takes float32
    and bfloat16, not float16). The weights are the file's own pages, never in memory twice.
    FileNotFoundError for what is not there, ValueError for what is refused.
    """
    folder = Path(path)
    config, plan = pretrained_config(folder)
    files = weight_files(folder)
    if plan is not None:
        files.append(folder / "unimod.safetensors")
    with torch.device("meta"):
        model = UnifiedTransformer(config, plan)
    model.load_state_dict(state_from(files, model, dtype), assign=True)
    return model.eval()


# --- Writing ---

def save_pretrained(model: UnifiedTransformer, path) -> None:
    """Writes a folder that load_pretrained reads to the bit, and transformers as the dense model.

    An Emu3 is written as a Llama with the same weights, since AutoModelForCausalLM does not know
    its language model alone. All files are written under temporary names, read back, then renamed,
    config.json last. ValueError, before that, for a config that Hugging Face cannot express.
    """
    model, folder, save_file = unwrapped(model), Path(path), safetensors()[1]
    config = as_plain_data(config_to_hf(model.config))
    config["dtype"] = config["torch_dtype"] = str(model.head.weight.dtype).removeprefix("torch.")
    ours = {"plan": model.plan} | {field: getattr(model.config, field) for field in OUR_FIELDS}
    state, weights = model.state_dict(), {"unimod.safetensors": {}, "model.safetensors": {}}
    for name, our in their_names(model).items():
        file = "unimod.safetensors" if name == our else "model.safetensors"
        weights[file][name] = state[our]
    with ExitStack() as files:  # closed in the reverse order
        for name, content in (("config.json", config), ("unimod.json", ours)):
            file = files.enter_context(whole_file(folder / name))
            file.write(json_text(content, indent=1))
        for name, content in weights.items():
            part = files.enter_context(whole_file(folder / name, "wb")).name
            save_file(untied(content), part, {"format": "pt"})
            back = {name: tensor.shape for name, tensor in tensors(Path(part))}
            if back != {name: tensor.shape for name, tensor in content.items()}:
                raise OSError(f"{part}: what was written is not what is read back: look at the "
                              "disk")


def untied(weights: dict) -> dict:
    """The same weights; one that shares the memory of an earlier one is copied."""
    apart, seen = {}, set()
    for name, weight in weights.items():
        apart[name] = weight.clone() if weight.data_ptr() in seen else weight.contiguous()
        seen.add(weight.data_ptr())
    return apart

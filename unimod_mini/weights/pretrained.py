"""Hugging Face checkpoints of Phi, Show-o, Llama and Emu3 (whose weights have Llama's names), in
and out.

    model = load_pretrained("folder")  # dense: layer_switch -> model.with_plan(plan) -> train
    # transformers loads it as the dense model, load_pretrained as the routed
    save_pretrained(model, "another")

What Hugging Face has no name for, the plan, routers, predictors and thresholds, lies beside its
files in unimod.json and unimod.safetensors. What the two sides call differently is said once, in
NAMES and FIELDS, and read in both directions. What this code cannot compute is refused: loading
never returns another function than the file's.

Their texts and pictures as ids: codec.HFText and codec.Codes.

Sources: transformers 5.24 (models/phi, llama, emu3), showlab/Show-o (models/modeling_showo.py,
phi.py) and baaivision/Emu3 (emu3/mllm/configuration_emu3.py). Legend: ours, our state dict and
ModelConfig; theirs, Hugging Face's.
"""

import json
import re
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from ..atomic_files import json_text, plain, whole_file
from ..config import PRESETS, ModelConfig
from ..plan import Plan
from ..inference import WRAPPERS, unwrapped
from ..transformer import UnifiedTransformer

# Two vocabularies

BOTH = {"embed": "model.embed_tokens", "head": "lm_head", "N.norm": "N.input_layernorm",
        "N.attention.q": "N.self_attn.q_proj", "N.attention.k": "N.self_attn.k_proj",
        "N.attention.v": "N.self_attn.v_proj"}
NAMES = {          # modules, ours: theirs; N is blocks.0 and model.layers.0 ..; weight and bias have one name
    "showo": BOTH | {"norm": "model.final_layernorm", "N.attention.out": "N.self_attn.dense",
                     "N.attention.q_norm": "N.self_attn.q_layernorm", "N.attention.k_norm": "N.self_attn.k_layernorm",
                     "N.mlp.up": "N.mlp.fc1", "N.mlp.down": "N.mlp.fc2"},
    "emu3": BOTH | {"norm": "model.norm", "N.attention.out": "N.self_attn.o_proj",
                    "N.norm_mlp": "N.post_attention_layernorm", "N.mlp.gate": "N.mlp.gate_proj",
                    "N.mlp.up": "N.mlp.up_proj", "N.mlp.down": "N.mlp.down_proj"}}
# where a language model is nested: in Show-o; in Emu3ForConditionalGeneration on disk; the same in
# memory
NESTED = re.compile(r"^showo\.|^text_model\.(?=model\.|lm_head\.)|(?<=^model\.)text_model\.")
# Emu3's image tokenizer; a constant
IGNORED = re.compile(r"^(model\.)?vqmodel\.|\.rotary_emb\.inv_freq$")

FIELDS = {         # ModelConfig: config.json; the rotary fields lie at its top or in rope_parameters
    "n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_kv_head": "num_key_value_heads",
    "d_model": "hidden_size", "d_ff": "intermediate_size", "vocab_size": "vocab_size",
    "max_length": "max_position_embeddings", "attention_dropout": "attention_dropout", "rope_theta": "rope_theta",
    "rope_fraction": "partial_rotary_factor", "qk_norm": "qk_layernorm"}
# unimod.json has these, and the plan
OUR_FIELDS = ("image_start", "gate", "membership", "predictor_width")
# what we write
ARCHITECTURES = {"showo": ("phi", "PhiForCausalLM"), "emu3": ("llama", "LlamaForCausalLM")}

ANY = {"tie_word_embeddings": (False,), "rope_type": (None, "default"), "type": (None, "default"),
       "sliding_window": (None,), "quantization_config": (None,), "image_positions": (None, 0)}  # the last is ours
SUPPORTED = {      # what a field must be where it is set, in both directions; the first is what we write, None: nothing
    "showo": ANY | {"hidden_act": ("gelu_pytorch_tanh", "gelu_new"), "layer_norm_eps": (1e-5,)},
    "emu3": ANY | {"hidden_act": ("silu",), "rms_norm_eps": (1e-5,), "attention_bias": (False,), "mlp_bias": (False,),
                   "partial_rotary_factor": (1.0,), "qk_layernorm": (False,)}}

LLAMA = {"rope_theta": 1e4, "partial_rotary_factor": 1.0, "qk_layernorm": False, "attention_dropout": 0.0,
         "rms_norm_eps": 1e-6}
# Emu3Config's own defaults are Emu3's sizes, and a text_config on disk may hold no more than what
# differs from them
EMU3 = {theirs: getattr(PRESETS["emu3-8b"], ours) for ours, theirs in FIELDS.items()}
MODEL_TYPES = {    # model_type: our backbone, and what an absent field means
    "phi": ("showo", LLAMA | {"partial_rotary_factor": 0.5}), "llama": ("emu3", LLAMA),
    "emu3_text_model": ("emu3", EMU3), "Emu3": ("emu3", EMU3)}                   # Emu3: of baaivision/Emu3 itself


def their_names(model: UnifiedTransformer) -> dict:
    """{theirs: ours} for the whole state dict; routers have no name there and keep ours."""
    modules = {ours.replace("N", f"blocks.{n}"): theirs.replace("N", f"model.layers.{n}")
               for n in range(model.config.n_layer) for ours, theirs in NAMES[model.config.backbone].items()}
    parts = [name.rpartition(".") for name in model.state_dict()]
    return {f"{modules.get(module, module)}.{kind}": f"{module}.{kind}" for module, _, kind in parts}


# config.json

def check_supported(backbone: str, given: dict, **more) -> None:
    """ValueError for a field with another value than those of SUPPORTED and `more`; None is not
    set.
    """
    for field, values in (SUPPORTED[backbone] | more).items():
        if given.get(field) not in (None, *values):
            raise ValueError(f"{field} is {given[field]!r}, supported: {' or '.join(map(repr, values))}")


def config_to_hf(config: ModelConfig) -> dict:
    """The fields of config.json, for old and new versions.

    ValueError names one that Hugging Face cannot express.
    """
    model_type, architecture = ARCHITECTURES[config.backbone]
    fields = {theirs: getattr(config, ours) for ours, theirs in FIELDS.items()}
    check_supported(config.backbone, fields | {"image_positions": config.image_positions})
    fixed = {field: values[0] for field, values in SUPPORTED[config.backbone].items() if values[0] is not None}
    rope = {field: fields[field] for field in ("rope_theta", "partial_rotary_factor")}
    return {"architectures": [architecture], "model_type": model_type, "bos_token_id": None, "eos_token_id": None,
            **fixed, **fields, "rope_parameters": {"rope_type": "default", **rope}}


def config_from_hf(config: dict) -> ModelConfig:
    """config.json -> ModelConfig. ValueError names a missing field, or one whose value this code
    cannot compute.

    Dropout: attention_dropout is kept; Phi's resid_pdrop and embd_pdrop are not, nor Emu3's of the
    residual branches.
    """
    if "llm_vocab_size" in config:
        return showo_config(config)
    kind = config.get("model_type")
    if kind == "emu3":  # Emu3ForConditionalGeneration nests the language model
        return config_from_hf(config | (config.get("text_config") or {}) | {"model_type": "emu3_text_model"})
    if kind not in MODEL_TYPES:
        raise ValueError(f"model_type is {kind!r}, supported: {', '.join(MODEL_TYPES)}, emu3, and Show-o's config.json")
    backbone, absent = MODEL_TYPES[kind]
    given = absent | config | (config.get("rope_scaling") or {}) | (config.get("rope_parameters") or {})
    if given.get("num_key_value_heads") is None:
        given["num_key_value_heads"] = given.get("num_attention_heads")
    if missing := [field for field in FIELDS.values() if given.get(field) is None]:
        raise ValueError(f"no {', '.join(missing)}")
    model = ModelConfig(backbone, image_start=image_start(kind, given), **{our: given[f] for our, f in FIELDS.items()})
    check_supported(backbone, given, head_dim=(model.head_width,))
    return model


def image_start(kind: str, given: dict) -> int:
    """First id of the image codes. Phi and Llama have none: vocab_size.

    Emu3's are listed in vocabulary_map; without it they are the last 32,768 ids, as in the
    published vocabulary.
    """
    if MODEL_TYPES[kind][1] is not EMU3:
        return given["vocab_size"]
    names = given.get("vocabulary_map") or {}
    ids = [names[name] for name in sorted(names) if name.startswith("<|visual token")]
    if ids and ids != list(range(ids[0], ids[0] + len(ids))):
        raise ValueError("vocabulary_map scatters the visual tokens, supported: ascending ids without gaps")
    start = ids[0] if ids else given["vocab_size"] - 32768
    return start if start > 0 else given["vocab_size"]


def showo_config(config: dict) -> ModelConfig:
    """Show-o's config.json names Phi-1.5 (llm_model_path), not its sizes; its code switches QK norm
    on.

    Ids: text, special tokens, image codes, mask.
    """
    if config.get("w_clip_vit"):
        raise ValueError("w_clip_vit is true: its pictures are CLIP features, supported: false, pictures as codes")
    start = config["llm_vocab_size"] + config.get("num_new_special_tokens", 10)
    vocabulary = start + config.get("codebook_size", 8192) + 1
    if config["vocab_size"] != vocabulary:
        raise ValueError(f"vocab_size is {config['vocab_size']}, supported: text, special, codes, mask: {vocabulary}")
    return replace(PRESETS["showo-1.3b"], vocab_size=vocabulary, image_start=start)


# Files

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
    """What the JSON file holds; a ValueError of the block names the file."""
    try:
        yield json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: {'no ' if isinstance(error, KeyError) else ''}{error}") from None


def weight_files(folder: Path) -> list:
    """The file with the weights, or the parts that its index lists."""
    for name in WEIGHTS:
        if (folder / name).exists():
            return [folder / name]
        if (index := folder / f"{name}.index.json").exists():
            with reading(index) as stored:
                parts = sorted(set(stored["weight_map"].values()))
                if not parts:
                    raise ValueError("weight_map is empty, expected the file of every weight")
                return [folder / part for part in parts]
    raise FileNotFoundError(f"{folder} has no weights: {', '.join(WEIGHTS)}, or an index of parts")


def tensors(file: Path):
    """(name, tensor) of one file, mapped: a page is read when it is used.

    ValueError when the file is not whole.
    """
    try:
        if ".safetensors" in file.suffixes:  # also of one that has not got its name yet
            with safetensors()[0](file, "pt") as stored:
                yield from ((name, stored.get_tensor(name)) for name in stored.keys())
        else:
            yield from torch.load(file, "cpu", mmap=True, weights_only=True).items()
    except (FileNotFoundError, ImportError):
        raise
    except Exception as error:  # torch's own text advises to load it unsafely
        raise ValueError(f"{file} is not a whole file of plain tensors (nor is a pointer of git-lfs, or a .bin from "
                         "before torch 1.6)") from error


def state_from(files: list, model: UnifiedTransformer, dtype) -> dict:
    """The state dict of `model`: every weight exactly once and in its shape, or a ValueError
    that lists what is not.
    """
    names, wanted, state, wrong = their_names(model), model.state_dict(), {}, []
    for file in files:
        for key, tensor in tensors(file):
            if IGNORED.search(key):
                continue
            ours = names.pop(NESTED.sub("", WRAPPERS.sub("", key)), None)
            if ours is None:
                wrong.append(f"{key} is unknown or there twice")
            elif not isinstance(tensor, torch.Tensor):
                wrong.append(f"{key} is a {type(tensor).__name__} instead of a tensor")
            elif tensor.shape != wanted[ours].shape or not tensor.is_floating_point():
                wrong.append(f"{key} is {tuple(tensor.shape)} {tensor.dtype} instead of {tuple(wanted[ours].shape)}")
            else:
                state[ours] = tensor.to(dtype or tensor.dtype)
    wrong += [f"{name} is missing" for name in names]
    if wrong:
        more = f"; and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise ValueError(f"{files[0].parent} does not fit its config: {'; '.join(wrong[:4])}{more}")
    return state


def pretrained_config(path) -> tuple[ModelConfig, Plan | None]:
    """The sizes of a folder of Hugging Face or of save_pretrained, and its plan if it has one.

    Errors as below.
    """
    folder, plan = Path(path), None
    if not folder.is_dir():
        raise FileNotFoundError(f"{path} is not a folder; fetch a checkpoint by: hf download NAME --local-dir FOLDER")
    with reading(folder / "config.json") as stored:
        config = config_from_hf(stored)
    if (ours := folder / "unimod.json").exists():
        with reading(ours) as stored:
            plan, config = Plan(**stored.pop("plan")), replace(config, **stored)
            if plan.n_layer != config.n_layer:
                raise ValueError(f"the plan has {plan.n_layer} layers, the model {config.n_layer}")
    return config, plan


def load_pretrained(path, dtype: torch.dtype | None = None) -> UnifiedTransformer:
    """A folder, of Hugging Face or of save_pretrained -> the model, on the CPU, dense unless the
    folder has a plan.

    In eval mode. dtype None keeps the file's: float32 or bfloat16 to train, not float16. The
    weights are the file's own pages, never in memory twice. FileNotFoundError for what is not
    there, ValueError for what is refused.
    """
    (config, plan), folder = pretrained_config(path), Path(path)
    files = weight_files(folder) + ([folder / "unimod.safetensors"] if plan else [])
    with torch.device("meta"):
        model = UnifiedTransformer(config, plan)
    model.load_state_dict(state_from(files, model, dtype), assign=True)
    return model.eval()


def save_pretrained(model: UnifiedTransformer, path) -> None:
    """Write a folder that load_pretrained reads to the bit, and transformers (AutoModelForCausalLM)
    as the dense model.

    Emu3 is written as Llama, the same weights: AutoModelForCausalLM does not know Emu3's language
    model alone. All files are written under temporary names, read back and then renamed,
    config.json last: without it a folder is refused. ValueError, before anything is written, for a
    config that Hugging Face cannot express.
    """
    model, folder, save_file = unwrapped(model), Path(path), safetensors()[1]
    config = plain(config_to_hf(model.config))
    config["dtype"] = config["torch_dtype"] = str(model.head.weight.dtype).removeprefix("torch.")
    ours = {"plan": model.plan} | {field: getattr(model.config, field) for field in OUR_FIELDS}
    state, weights = model.state_dict(), {"unimod.safetensors": {}, "model.safetensors": {}}
    for name, our in their_names(model).items():
        weights[f"{'unimod' if name == our else 'model'}.safetensors"][name] = state[our]
    with ExitStack() as files:                             # closed in the reverse order
        for name, content in (("config.json", config), ("unimod.json", ours)):
            files.enter_context(whole_file(folder / name)).write(json_text(content, indent=1))
        for name, content in weights.items():
            part = files.enter_context(whole_file(folder / name, "wb")).name
            save_file(untied(content), part, {"format": "pt"})
            if shapes(dict(tensors(Path(part)))) != shapes(content):
                raise OSError(f"{part}: what was written is not what is read back: look at the disk")


def untied(weights: dict) -> dict:
    """The same weights, of which no two share their memory: the later ones of tied weights are
    copies.
    """
    apart, seen = {}, set()
    for name, weight in weights.items():
        apart[name] = weight.clone() if weight.data_ptr() in seen else weight.contiguous()
        seen.add(weight.data_ptr())
    return apart


def shapes(weights: dict) -> dict:
    return {name: weight.shape for name, weight in weights.items()}

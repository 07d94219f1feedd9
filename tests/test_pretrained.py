"""Hugging Face's checkpoints in and out: the same function both ways, everything else refused.

Parity needs transformers, .safetensors files need safetensors: without them, tests are skipped.
"""
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import BACKBONES, N_LAYER, build, plans, seeds, tiny
from unimod_mini import layer_switch
from unimod_mini.config import PRESETS, ModelConfig
from unimod_mini.plan import Plan
from unimod_mini.tokenizer import Batch
from unimod_mini.transformer import UnifiedTransformer
from unimod_mini.weights.pretrained import (config_from_hf, config_to_hf, load_pretrained,
                                            save_pretrained, their_names)

PLAN = Plan({"t2i": (1, .5, 0), "mmu": (.25, .75, 1)})
IDS = torch.arange(20).view(2, 10) % 17


@pytest.fixture
def safetensors():
    return pytest.importorskip("safetensors.torch")


@pytest.fixture
def hf():
    module = pytest.importorskip("transformers")
    module.utils.logging.disable_progress_bar()
    return module


def write(folder, config, weights, name="pytorch_model.bin"):
    """A folder as someone else may have made it, with config.json and a .bin file."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(weights, folder / name)
    return folder


def theirs(model):
    """The dense weights under Hugging Face's names."""
    state = model.state_dict()
    return {their: state[our] for their, our in their_names(model).items() if their != our}


def written(folder, backbone="showo", **changes):
    """A folder with a tiny model, and the model."""
    model = build(tiny(backbone), dtype=torch.float32)
    return write(folder, config_to_hf(model.config) | changes, theirs(model)), model


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    if a.keys() != b.keys():
        return False
    return all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def logits(model, ids=IDS):
    with torch.no_grad():
        return model.eval()(ids).logits


def assert_same_logits(own, other):
    """Of a model here and one of transformers."""
    with torch.no_grad():
        expected = other.eval()(input_ids=IDS).logits
    torch.testing.assert_close(logits(own), expected, atol=1e-5, rtol=1e-5)


# --- Parity with transformers ---

SHAPE = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
             num_attention_heads=4, max_position_embeddings=64)
ROPE = {"rope_type": "default", "rope_theta": 500.0}
THETA = {"rope_parameters": ROPE}
PHI_THETA = {"rope_parameters": ROPE | {"partial_rotary_factor": 0.25}}
TOKENS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
GROUPED = SHAPE | TOKENS | dict(num_key_value_heads=2)
IMAGE = {f"<|visual token {i:06d}|>": 30 + i for i in range(10)}
IMAGE |= {"<image>": 28, "<|extra_200|>": 29, "a": 3}
VQ = dict(codebook_size=10, base_channels=32, channel_multiplier=[1, 1], num_res_blocks=1,
          attn_resolutions=[], hidden_size=32, embed_dim=4)
MODELS = {  # transformers' class, its config's class, arguments, the image codes' first id
    "phi": ("PhiForCausalLM", "PhiConfig", SHAPE | dict(bos_token_id=None, eos_token_id=None), 40),
    "phi-qk": ("PhiForCausalLM", "PhiConfig",
               SHAPE | dict(qk_layernorm=True, hidden_act="gelu_pytorch_tanh"), 40),
    "phi-grouped": ("PhiForCausalLM", "PhiConfig",
                    SHAPE | PHI_THETA | dict(num_key_value_heads=2), 40),
    "llama": ("LlamaForCausalLM", "LlamaConfig",
              SHAPE | THETA | dict(num_key_value_heads=2, rms_norm_eps=1e-5), 40),
    "emu3": ("Emu3ForCausalLM", "Emu3TextConfig", GROUPED, 40),
    "emu3-codes": ("Emu3ForCausalLM", "Emu3TextConfig",
                   SHAPE | THETA | TOKENS | dict(vocab_size=32800, num_key_value_heads=4), 32),
    "emu3-images": ("Emu3ForConditionalGeneration", "Emu3Config",
                    dict(text_config=GROUPED, vq_config=VQ, vocabulary_map=IMAGE), 30)}


def their_model(hf, name):
    """A random model of transformers, norms and biases too, so that a forgotten one shows."""
    kind, config, arguments, _ = MODELS[name]
    torch.manual_seed(0)
    model = getattr(hf, kind)(getattr(hf, config)(**arguments)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3).add_(parameter.dim() == 1)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_theirs_computes_the_same_here(hf, tmp_path, name):
    """Save there, load here: every logit, and the place of the image codes."""
    model = their_model(hf, name)
    model.save_pretrained(tmp_path)
    own = load_pretrained(tmp_path)
    assert_same_logits(own, model)
    assert own.config.image_start == MODELS[name][3]


@pytest.mark.parametrize("size", ["20KB", "1MB"])
def test_shards(hf, tmp_path, size):
    """An index of parts is the same model as one file."""
    model = their_model(hf, "phi-qk")
    model.save_pretrained(tmp_path, max_shard_size=size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (size == "20KB")
    assert_same_logits(load_pretrained(tmp_path), model)


@pytest.mark.parametrize("backbone, changes", [
    ("showo", {}), ("showo", dict(qk_norm=False, n_kv_head=2, rope_fraction=1.0)),
    ("showo", dict(rope_theta=77.0)),
    ("emu3", {}), ("emu3", dict(n_kv_head=4, rope_theta=77.0))])
def test_ours_computes_the_same_there(hf, tmp_path, backbone, changes):
    """Save a routed model here, AutoModelForCausalLM there: the dense model, every weight used."""
    model = build(tiny(backbone, attention_dropout=0.1, **changes), PLAN, dtype=torch.float32)
    save_pretrained(model, tmp_path)
    other, report = hf.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert other.dtype == torch.float32 and other.config.attention_dropout == 0.1
    assert_same_logits(model.with_plan(Plan.dense(N_LAYER)), other)


@pytest.mark.parametrize("backbone, dtype", [("showo", torch.float32), ("emu3", torch.bfloat16)])
def test_there_and_back(hf, tmp_path, backbone, dtype):
    """What transformers loads and saves again is the dense model here, in its dtype, and the
    routed one if it lies beside unimod.json."""
    model = build(tiny(backbone), PLAN, dtype=dtype)
    save_pretrained(model, tmp_path / "a")
    other = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    for folder in ("a", "b"):
        other.save_pretrained(tmp_path / folder)
    assert same_state(load_pretrained(tmp_path / "a"), model)
    assert load_pretrained(tmp_path / "a").config == model.config
    assert same_state(load_pretrained(tmp_path / "b"), model.with_plan(Plan.dense(N_LAYER)))


# --- The true sizes ---

def documented(config):
    """Names and shapes from the published state dicts, spelled out by hand."""
    d, f, v = config.d_model, config.d_ff, config.vocab_size
    kv, emu3 = config.n_kv_head * config.head_width, config.backbone == "emu3"
    shapes = {"model.embed_tokens.weight": (v, d), "lm_head.weight": (v, d)}
    for n in range(config.n_layer):
        layer = f"model.layers.{n}."
        linear = {"self_attn.q_proj": (d, d), "self_attn.k_proj": (kv, d),
                  "self_attn.v_proj": (kv, d), "input_layernorm": (d,)}
        if emu3:
            linear |= {"self_attn.o_proj": (d, d), "mlp.gate_proj": (f, d), "mlp.up_proj": (f, d),
                       "mlp.down_proj": (d, f), "post_attention_layernorm": (d,)}
        else:
            linear |= {"self_attn.dense": (d, d), "mlp.fc1": (f, d), "mlp.fc2": (d, f)}
        if config.qk_norm:
            width = config.head_width
            linear |= {"self_attn.q_layernorm": (width,), "self_attn.k_layernorm": (width,)}
        for name, shape in linear.items():
            shapes[f"{layer}{name}.weight"] = shape
            if not emu3:
                shapes[f"{layer}{name}.bias"] = shape[:1]
    if emu3:
        return shapes | {"model.norm.weight": (d,)}
    return shapes | {"model.final_layernorm.weight": (d,), "model.final_layernorm.bias": (d,),
                     "lm_head.bias": (v,)}


TRUE = {"showo-1.3b": 1_448_176_770, "emu3-8b": 8_492_011_520}


@pytest.mark.parametrize("preset", TRUE)
def test_names_and_shapes_at_true_size(preset):
    config = PRESETS[preset]
    with torch.device("meta"):
        model = UnifiedTransformer(config)
    found = {name: tuple(weight.shape) for name, weight in theirs(model).items()}
    assert found == documented(config)
    assert sum(p.numel() for p in model.parameters()) == TRUE[preset]
    assert sum(torch.Size(shape).numel() for shape in found.values()) == TRUE[preset]


@pytest.mark.parametrize("preset", TRUE)
def test_transformers_at_true_size(hf, preset):
    """Our config.json makes transformers build exactly the documented names and shapes."""
    config = hf.AutoConfig.for_model(**config_to_hf(PRESETS[preset]))
    with torch.device("meta"):
        models = [hf.AutoModelForCausalLM.from_config(config)]
        if preset == "emu3-8b":
            models.append(hf.Emu3ForCausalLM(hf.Emu3TextConfig()))
    for model in models:
        found = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
        assert found == documented(PRESETS[preset])


@pytest.mark.parametrize("config, preset", [
    ({"model_type": "emu3"}, "emu3-8b"),   # text_config may hold only what differs from defaults
    ({"model_type": "emu3", "text_config": {"max_position_embeddings": 9216,
                                            "rope_scaling": {"rope_type": "default"}}}, "emu3-8b"),
    (dict(model_type="Emu3", vocab_size=184622, hidden_size=4096, intermediate_size=14336,
          num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, hidden_act="silu",
          max_position_embeddings=9216, rms_norm_eps=1e-5, rope_theta=1e6, rope_scaling=None,
          attention_dropout=0.1, pretraining_tp=1, boi_token_id=151852, tie_word_embeddings=False,
          torch_dtype="bfloat16"), "emu3-8b"),
    (dict(w_clip_vit=False, vocab_size=58498, llm_vocab_size=50295,
          llm_model_path="microsoft/phi-1_5", codebook_size=8192, num_vq_tokens=256),
     "showo-1.3b")])
def test_published_configs(config, preset):
    """What the published folders say, in its forms, is the preset."""
    assert config_from_hf(config) == PRESETS[preset]


def test_phi_1_5():
    """microsoft/phi-1_5's config.json, rotary settings at the top: Show-o's sizes, Phi's ids."""
    config = dict(
        model_type="phi", architectures=["PhiForCausalLM"], attention_dropout=0.0, embd_pdrop=0.0,
        hidden_act="gelu_new", hidden_size=2048, intermediate_size=8192, layer_norm_eps=1e-05,
        max_position_embeddings=2048, num_attention_heads=32, num_hidden_layers=24,
        num_key_value_heads=None, partial_rotary_factor=0.5, qk_layernorm=False, resid_pdrop=0.0,
        rope_scaling=None, rope_theta=10000.0, tie_word_embeddings=False, torch_dtype="float16",
        vocab_size=51200)
    expected = replace(PRESETS["showo-1.3b"], vocab_size=51200, image_start=51200, qk_norm=False)
    assert config_from_hf(config) == expected
    for default in ("partial_rotary_factor", "rope_theta", "num_key_value_heads"):
        del config[default]
    assert config_from_hf(config) == expected


# --- There and back, to the bit ---

@st.composite
def models(draw):
    """Any small model that Hugging Face has words for, with any plan and routers."""
    backbone, n_layer = draw(st.sampled_from(BACKBONES)), draw(st.integers(1, 3))
    n_kv, groups, half = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    n_head, vocab, showo = n_kv * groups, draw(st.integers(2, 40)), backbone == "showo"
    config = ModelConfig(
        backbone, n_layer, n_head, n_kv, d_model=n_head * 2 * half, d_ff=draw(st.integers(1, 9)),
        vocab_size=vocab, max_length=draw(st.integers(8, 99)),
        image_start=draw(st.integers(0, vocab)), rope_theta=draw(st.floats(1, 1e7)),
        rope_fraction=draw(st.integers(0, half)) / half if showo else 1.0,
        qk_norm=showo and draw(st.booleans()), attention_dropout=draw(st.floats(0, 0.9)),
        gate=draw(st.sampled_from(("tanh", "linear", "sigmoid"))),
        membership=draw(st.sampled_from(("predictor", "router"))),
        predictor_width=draw(st.integers(0, 3)))
    dtype = draw(st.sampled_from((torch.float32, torch.bfloat16)))
    return build(config, draw(plans(n_layer)), draw(seeds), dtype)


@given(models())
def test_round_trip(model):
    """Save, load: every weight, router, predictor and threshold to the bit, the same plan and
    config. (Logits may differ in their last bits: a matrix product may add up in another order
    where weights are aligned otherwise.)"""
    pytest.importorskip("safetensors")
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder)
        loaded = load_pretrained(folder)
        assert same_state(loaded, model)
        assert (loaded.config, loaded.plan) == (model.config, model.plan)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_bin_files(tmp_path, backbone):
    """.bin files need no other package, whole or in parts."""
    folder, model = written(tmp_path, backbone)
    assert same_state(load_pretrained(folder), model)
    weights, parts = theirs(model), {}
    (folder / "pytorch_model.bin").unlink()
    for n, name in enumerate(weights):
        parts[name] = f"pytorch_model-{n % 3}.bin"
    for part in set(parts.values()):
        torch.save({name: weights[name] for name in weights if parts[name] == part}, folder / part)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": parts}))
    assert same_state(load_pretrained(folder), model)


@pytest.mark.parametrize("prefix", ["", "model.text_model.", "text_model.model."])
def test_prefixes(tmp_path, prefix):
    """Emu3's language model is nested in three ways; its image tokenizer and old rotary buffers
    are passed by."""
    model = build(tiny("emu3"), dtype=torch.float32)
    weights = {"model.vqmodel.a.weight": torch.ones(3), "vqmodel.b": torch.ones(2),
               "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    for name, weight in theirs(model).items():
        if "lm_head" in name and prefix.startswith("text"):
            weights[f"text_model.{name}"] = weight
        else:
            weights[name.replace("model.", prefix or "model.", 1)] = weight
    assert any(name.startswith(prefix) for name in weights)
    folder = write(tmp_path, config_to_hf(model.config), weights)
    assert same_state(load_pretrained(folder), model)


def test_showo_folder(tmp_path, monkeypatch):
    """Show-o's own folder: its config.json without Phi's sizes, its weights under showo.; a
    picture sees itself."""
    config = tiny("showo", vocab_size=20 + 10 + 6 + 1, image_start=30)
    monkeypatch.setitem(PRESETS, "showo-1.3b", replace(config, vocab_size=99, image_start=9))
    model = build(config, dtype=torch.float32)
    stored = dict(_class_name="Showo", _diffusers_version="0.30.1", w_clip_vit=False,
                  vocab_size=37, llm_vocab_size=20, llm_model_path="microsoft/phi-1_5",
                  codebook_size=6, num_vq_tokens=4, load_from_showo=True,
                  num_new_special_tokens=10, mask_token_id=36)
    weights = {f"showo.{name}": weight for name, weight in theirs(model).items()}
    loaded = load_pretrained(write(tmp_path, stored, weights))
    assert loaded.config == config and same_state(loaded, model)
    spans = torch.tensor([[0] * 4 + [1] * 6])
    changed = IDS[:1].clone()
    changed[0, 9] = 36                     # the picture's last token
    with torch.no_grad():
        a, b = (loaded.eval()(ids, spans=spans).logits[0] for ids in (IDS[:1], changed))
    assert torch.equal(a[:4], b[:4]) and (a[4:] != b[4:]).any(1).all()


def test_put_unimod_on_a_checkpoint(safetensors, tmp_path):
    """load -> layer_switch -> with_plan -> a training step -> save -> load; the file that was
    loaded is not touched."""
    folder, _ = written(tmp_path / "dense")
    before = (folder / "pytorch_model.bin").read_bytes()
    model = load_pretrained(folder)
    batch = Batch(IDS, None, None, None)
    plan = layer_switch(model, {"t2i": batch, "mmu": batch}, budget=0.8)
    routed = model.with_plan(plan)
    for trained in (model, routed):        # mapped pages are written to privately
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
        trained(IDS).logits.square().mean().backward()
        optimizer.step()
    save_pretrained(routed, tmp_path / "routed")
    loaded = load_pretrained(tmp_path / "routed")
    assert loaded.plan == plan and same_state(loaded, routed)
    assert any(map(plan.routed, range(N_LAYER)))
    assert (folder / "pytorch_model.bin").read_bytes() == before


def test_weights_in_another_layout(safetensors, tmp_path):
    """A transposed view is stored as what it says."""
    model = build(tiny("emu3"), dtype=torch.float32)
    model.head.weight = torch.nn.Parameter(model.head.weight.T.contiguous().T)
    save_pretrained(model, tmp_path)
    assert same_state(load_pretrained(tmp_path), model)


def test_a_loaded_model_does_not_drop_out(tmp_path):
    """Eval mode: Emu3's own config has attention dropout."""
    folder, model = written(tmp_path, "emu3", attention_dropout=0.5)
    loaded = load_pretrained(folder)
    assert not loaded.training and loaded.config.attention_dropout == 0.5
    assert torch.equal(loaded(IDS).logits, model.eval()(IDS).logits)


def test_dtype(safetensors, tmp_path):
    """dtype converts everything, routers too; config.json names the dtype of the weights."""
    model = build(tiny("emu3"), PLAN, dtype=torch.float32)
    save_pretrained(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "float32"
    assert same_state(load_pretrained(tmp_path, torch.bfloat16), model.bfloat16())


# --- Refusals ---

PHI, LLAMA = (config_to_hf(tiny(backbone)) for backbone in BACKBONES)
EMU3 = {"model_type": "emu3", "text_config": {}}
SHOWO = dict(w_clip_vit=False, vocab_size=58498, llm_vocab_size=50295, codebook_size=8192)


def nested(config, **fields):
    return config | {"text_config": fields}


def without(config, *fields):
    return {field: value for field, value in config.items() if field not in fields}


LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}
PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
SCATTERED = {"<|visual token 000000|>": 151854, "<|visual token 000001|>": 151856}


@pytest.mark.parametrize("config, message", [
    (PHI | {"hidden_act": "gelu"}, "hidden_act is 'gelu', supported: 'gelu_pytorch_tanh' or 'gelu"),
    (LLAMA | {"hidden_act": "gelu"}, "hidden_act is 'gelu', supported: 'silu'"),
    (PHI | {"layer_norm_eps": 1e-6}, "layer_norm_eps is 1e-06, supported: 1e-05"),
    (LLAMA | {"rms_norm_eps": 1e-6}, "rms_norm_eps is 1e-06, supported: 1e-05"),
    (without(LLAMA, "rms_norm_eps"), "rms_norm_eps is 1e-06, supported: 1e-05"),   # its default
    (PHI | {"tie_word_embeddings": True}, "tie_word_embeddings is True, supported: False"),
    (LLAMA | {"tie_word_embeddings": True}, "tie_word_embeddings is True, supported: False"),
    (nested(EMU3, tie_word_embeddings=True), "tie_word_embeddings is True, supported: False"),
    (LLAMA | {"attention_bias": True}, "attention_bias is True, supported: False"),
    (LLAMA | {"mlp_bias": True}, "mlp_bias is True, supported: False"),
    (LLAMA | {"rope_parameters": LLAMA3}, "rope_type is 'llama3', supported: None or 'default'"),
    (PHI | {"rope_scaling": {"type": "linear"}}, "type is 'linear', supported: None or 'default'"),
    (nested(EMU3, rope_scaling={"type": "dynamic"}), "type is 'dynamic', supported: None or 'def"),
    (LLAMA | {"rope_parameters": PARTIAL}, "partial_rotary_factor is 0.5, supported: 1.0"),
    (LLAMA | {"head_dim": 64}, "head_dim is 64, supported: 8"),
    (PHI | {"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}, supported"),
    (EMU3 | {"quantization_config": {"bits": 8}}, "quantization_config is {'bits': 8}, supported"),
    (LLAMA | {"sliding_window": 4096}, "sliding_window is 4096, supported: None"),
    (PHI | {"model_type": "phi3"}, "model_type is 'phi3', supported: phi, llama, emu3_text_model"),
    ({}, "model_type is None, supported: phi"),
    (without(PHI, "hidden_size", "vocab_size"), "no hidden_size, vocab_size"),
    (PHI | {"num_attention_heads": 5}, "n_head=5 must divide d_model=32"),
    (PHI | {"num_hidden_layers": "three"}, "n_layer must be a whole number of at least 1, got 'three'"),
    (SHOWO | {"w_clip_vit": True}, "w_clip_vit is true: .* supported: false"),
    (SHOWO | {"vocab_size": 58499}, "vocab_size is 58499, supported: text, .* mask: 58498"),
    (EMU3 | {"vocabulary_map": SCATTERED}, "vocabulary_map scatters the visual tokens"),
], ids=lambda value: value[:24] if isinstance(value, str) else "")
def test_configs_that_are_refused(tmp_path, config, message):
    """By the file's name, the field, its value and what is supported, before any weight is read."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message) as caught:
        load_pretrained(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / "config.json"))


def test_none_means_absent():
    """null is what transformers writes for a field that is not set."""
    absent = dict.fromkeys(("rope_scaling", "quantization_config", "sliding_window", "head_dim",
                            "num_key_value_heads"))
    assert config_from_hf(PHI | absent) == replace(tiny("showo"), image_start=30)
    assert config_from_hf(LLAMA | absent).n_kv_head == 4


@pytest.mark.parametrize("backbone, field, value", [
    ("showo", "image_positions", 4), ("emu3", "image_positions", 4), ("emu3", "qk_norm", True),
    ("emu3", "rope_fraction", 0.5)])
def test_models_that_hugging_face_cannot_express(tmp_path, backbone, field, value):
    theirs = {"qk_norm": "qk_layernorm", "rope_fraction": "partial_rotary_factor"}.get(field, field)
    with pytest.raises(ValueError, match=f"^{theirs} is {value}, supported: "):
        save_pretrained(build(tiny(backbone, **{field: value})), tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("changes, message", [
    ({"model.layers.3.mlp.fc1.bias": torch.ones(2)}, "model.layers.3.mlp.fc1.bias is unknown"),
    ({"routers.0.t2i.score.bias": torch.ones(1)}, "routers.0.t2i.score.bias is unknown"),
    ({"showo.lm_head.bias": torch.ones(30)}, "showo.lm_head.bias is unknown or there twice"),
    ({"lm_head.bias": torch.ones(31)}, r"lm_head.bias is \(31,\) torch.float32 instead of \(30,\)"),
    ({"lm_head.bias": torch.ones(30, dtype=torch.int8)}, r"lm_head.bias is \(30,\) torch.int8"),
    ({"lm_head.bias": 3}, "lm_head.bias is a int instead of a tensor"),
    ({"lm_head.bias": [torch.zeros(2)]}, "lm_head.bias is a list instead of a tensor")])
def test_weights_that_do_not_fit(tmp_path, changes, message):
    """Every weight once, in its shape, and no other: the error says what is wrong."""
    folder, model = written(tmp_path)
    torch.save(theirs(model) | changes, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=f"does not fit its config: {message}"):
        load_pretrained(folder)


def test_missing_weights_are_listed(tmp_path):
    """The first four by name, and how many more."""
    folder, model = written(tmp_path)
    weights = theirs(model)
    gone = "model.layers.1.mlp.fc1.bias"
    for kept, message in ((weights.keys() - {gone}, f"{gone} is missing$"),
                          ((), "is missing; .*; and 55 more$")):
        torch.save({name: weights[name] for name in kept}, folder / "pytorch_model.bin")
        with pytest.raises(ValueError, match=message):
            load_pretrained(folder)


def test_folders_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="show-o is not a folder.*hf download NAME --local"):
        load_pretrained("showlab/show-o")
    with pytest.raises(FileNotFoundError, match="config.json"):
        load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(PHI))
    with pytest.raises(FileNotFoundError, match="has no weights: model.safetensors, .*, or an"):
        load_pretrained(tmp_path)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text('{"weight_map": {"lm_head.weight": "part-2.bin"}}')
    with pytest.raises(FileNotFoundError, match="part-2.bin"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("name, content, message", [
    ("config.json", '{"model_type": "ph', "Unterminated string"),
    ("config.json", "[1, 2]", "no attribute 'get'"),
    ("config.json", '{"model_type": ["phi"]}', "unhashable"),
    ("pytorch_model.bin", "", "not a whole file"),
    ("pytorch_model.bin", "version https://git-lfs.github.com/spec/v1", "pointer of git-lfs"),
    ("model.safetensors", "x" * 40, "not a whole file"),
    ("model.safetensors.index.json", "{}", "no 'weight_map'"),
    ("model.safetensors.index.json", '{"weight_map": {}}', "weight_map is empty"),
    ("unimod.json", "{", "Expecting property name"),
    ("unimod.json", '{"gate": "tanh"}', "no 'plan'"),
    ("unimod.json", '{"plan": {"keep": {"t2i": [2]}}}', r"must lie in \[0, 1\], got \(2.0,\)"),
    ("unimod.json", '{"plan": {"keep": {"t2i": [1]}}}', "the plan has 1 layers, the model 3"),
    ("unimod.json", '{"plan": {"keep": {"t2i": [1, 1, 1]}}, "colour": "red"}',
     "unexpected keyword argument 'colour'")])
def test_files_that_are_broken(tmp_path, name, content, message):
    """A ValueError that names the file and says what is wrong with it."""
    if name == "model.safetensors":
        pytest.importorskip("safetensors")
    folder, _ = written(tmp_path)
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        load_pretrained(folder)


def test_pickles_are_not_run(tmp_path):
    """A .bin file is read as plain tensors: code in it is refused, not run."""
    folder, _ = written(tmp_path)
    torch.save({"lm_head.weight": Path("x")}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin is not a whole file of plain tensors"):
        load_pretrained(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "unimod.safetensors"])
@pytest.mark.parametrize("part", [0, 0.01, 0.5, 0.999])
def test_truncated_files(safetensors, tmp_path, name, part):
    save_pretrained(build(tiny("showo"), PLAN, dtype=torch.float32), tmp_path)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[:int(part * len(content))])
    with pytest.raises(ValueError, match=f"{name} is not a whole file"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "unimod.safetensors"])
def test_folders_with_a_file_less(safetensors, tmp_path, name):
    save_pretrained(build(tiny("showo"), PLAN, dtype=torch.float32), tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load_pretrained(tmp_path)


def test_a_save_that_fails(safetensors, tmp_path, monkeypatch):
    """A full disk: a new folder is refused, an old one is as it was."""
    first, second = (build(tiny("emu3"), PLAN, seed, torch.float32) for seed in (0, 1))
    save_pretrained(first, tmp_path / "old")

    def full(tensors, *given, real=safetensors.save_file):
        if "lm_head.weight" in tensors:
            raise OSError("no space left")
        real(tensors, *given)
    monkeypatch.setattr("safetensors.torch.save_file", full)
    for name in ("old", "new"):
        with pytest.raises(OSError, match="no space left"):
            save_pretrained(second, tmp_path / name)
    monkeypatch.undo()
    assert same_state(load_pretrained(tmp_path / "old"), first)
    with pytest.raises(FileNotFoundError, match="config.json"):
        load_pretrained(tmp_path / "new")


def test_a_save_over_another(safetensors, tmp_path):
    """A model may be saved over the file that it is mapped from, and a dense one over a routed."""
    model = build(tiny("emu3"), PLAN, dtype=torch.float32)
    save_pretrained(model, tmp_path)
    loaded = load_pretrained(tmp_path)
    save_pretrained(loaded, tmp_path)
    assert same_state(load_pretrained(tmp_path), model) and same_state(loaded, model)
    save_pretrained(model.with_plan(Plan.dense(N_LAYER)), tmp_path)
    assert load_pretrained(tmp_path).plan == Plan.dense(N_LAYER)
    left = {file.name for file in tmp_path.iterdir()}
    assert left == {"config.json", "model.safetensors", "unimod.json", "unimod.safetensors"}


def test_without_safetensors(tmp_path, monkeypatch):
    """The message names the command; nothing is written."""
    monkeypatch.setitem(sys.modules, "safetensors", None)
    folder, model = written(tmp_path / "a")
    assert same_state(load_pretrained(folder), model)                            # .bin needs none
    with pytest.raises(ImportError, match="pip install safetensors"):
        save_pretrained(model, tmp_path / "b")
    assert not (tmp_path / "b").exists()
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ImportError, match="pip install safetensors"):
        load_pretrained(folder)

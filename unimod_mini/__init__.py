"""unimod_mini: task-aware Mixture-of-Depths for unified multimodal transformers, small enough to read."""

import warnings

from .cache import Cache
from .codec import ByteText, Codes, HFText, Palette, WordText
from .config import ModelConfig
from .data import Pictures, load_image_folder
from .flops import count_flops, flops_ratio
from .generate import generate_image, generate_text
from .layer_switch import METHODS, arank_table, layer_switch, plan_for_budget, plan_from_arank
from .pretrained import load_pretrained, save_pretrained
from .routers import Plan
from .shapes import World
from .tokenizer import Batch, Tokenizer
from .trainer import (calibrate, load_checkpoint, make_optimizers, predictor_report, save_checkpoint, seed_everything,
                      train_step)
from .transformer import UnifiedTransformer
from .vq import VQ, fit_vq

# `python -m unimod_mini.generate` runs a module that the lines above have imported; it defines functions alone
warnings.filterwarnings("ignore", "'unimod_mini", RuntimeWarning, "runpy")

__version__ = "0.1.0"

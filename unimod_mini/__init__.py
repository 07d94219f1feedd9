"""unimod_mini: task-aware Mixture-of-Depths for unified multimodal transformers.

Small enough to read: plan.py, routers.py and transformer.py are the method.
"""

import warnings

from .cache import Cache
from .checkpoint import load_checkpoint, save_checkpoint
from .config import ModelConfig
from .data.image_folder import Pictures, load_image_folder
from .flops import count_flops, flops_ratio
from .generate import generate_image, generate_text
from .image_codecs import Codes, Palette
from .layer_switch import METHODS, arank_table, layer_switch, plan_for_budget, plan_from_arank
from .objectives import train_step
from .optim import make_optimizers
from .plan import Plan
from .predictor import calibrate, predictor_report
from .shapes import World
from .text_codecs import ByteText, HFText, WordText
from .tokenizer import Batch, Tokenizer
from .transformer import UnifiedTransformer
from .vq import VQ, train_vq
from .weights.pretrained import load_pretrained, save_pretrained

# `python -m unimod_mini.generate` runs a module that these lines have imported: no harm, it
# defines functions alone
warnings.filterwarnings("ignore", "'unimod_mini", RuntimeWarning, "runpy")

__version__ = "0.1.0"

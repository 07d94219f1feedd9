"""A finished model in one file: weights, config, plan, precision, and more that is plain data."""

import torch

from .atomic_files import save_data
from .config import ModelConfig
from .device import find_precision
from .inference import unwrapped, without_wrappers
from .plan import Plan
from .transformer import UnifiedTransformer


def save_checkpoint(path, model: UnifiedTransformer, **extra) -> None:
    """Weights, config, plan, precision and `extra` data, for load_checkpoint.

    ValueError, before anything is written, for extra data that is not plain
    (atomic_files.as_plain_data) or takes one of these names.
    """
    model = unwrapped(model)
    own = {"model": model.state_dict(), "config": model.config, "plan": model.plan,
           "precision": model.precision}
    if taken := own.keys() & extra.keys():
        raise ValueError(f"save_checkpoint: {', '.join(sorted(taken))} is stored from the model: "
                         "take another name")
    save_data(path, own | extra)


def load_checkpoint(path, device="cpu",
                    precision: str = "auto") -> tuple[UnifiedTransformer, dict]:
    """What save_checkpoint wrote -> (model in evaluation mode, everything else).

    precision: as find_precision takes it; "auto" is the one that the model was trained in.
    ValueError names the file when it is something else.
    """
    wrong = f"{path} is not a checkpoint of unimod_mini"
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:                             # torch advises to load it unsafely
        raise ValueError(f"{wrong}: not a file of plain tensors and data") from error
    try:
        config, plan = ModelConfig(**stored.pop("config")), Plan(**stored.pop("plan"))
        with torch.device("meta"):                         # the file's tensors become the model's
            model = UnifiedTransformer(config, plan)
        model.load_state_dict(without_wrappers(stored.pop("model")), assign=True)
    except Exception as error:
        raise ValueError(f"{wrong}: {error}") from error
    trained = stored.pop("precision", "float32")           # absent from older checkpoints
    model.precision = find_precision(precision, torch.device(device), trained)
    return model.to(device).eval(), stored

"""Pictures as image codes from 0, and back: what a Tokenizer takes as its image codec, beside
vq.VQ.

    Palette    the nearest of some fixed patches
    Codes      pictures that are codes already

Each has .n_codes, .patch (pixels a side), .encode(pixels) -> codes and .decode(codes) -> pixels.

Legend: B pictures, H and W pixels, h and w rows and columns of image codes, p patch side.
"""

import numpy as np
import torch
from torch import Tensor


class Palette:
    """Image codes are the nearest of n fixed patches, (n, p, p, 3) uint8.

    Exact for images made of those patches.
    """

    def __init__(self, patches):
        self.patches = torch.as_tensor(patches, dtype=torch.uint8)
        shape = self.patches.shape
        if len(shape) != 4 or 0 in shape or shape[1] != shape[2] or shape[3] != 3:
            raise ValueError(f"Palette: patches must be (n, p, p, 3), got {tuple(shape)}")
        if (self.patches != torch.as_tensor(patches)).any():
            raise ValueError("Palette: patches must be whole numbers from 0 to 255: multiply shares by 255 and round")
        self.n_codes, self.patch = shape[:2]

    def encode(self, images: Tensor) -> Tensor:
        """images uint8 (B, H, W, 3) -> codes long (B, H/p, W/p).

        ValueError when H or W is no multiple of p.
        """
        vectors = cut_patches(images.to(self.patches.device), self.patch)    # (B, h, w, 3 p p)
        return nearest(vectors.flatten(0, 2), self.patches.flatten(1).float()).view(vectors.shape[:3])

    def decode(self, codes: Tensor) -> Tensor:
        """codes long (B, h, w) -> images uint8 (B, h p, w p, 3).

        ValueError for a code outside [0, n_codes).
        """
        check_codes(codes, self.n_codes)
        (B, h, w), p = codes.shape, self.patch
        patches = self.patches[codes.to(self.patches.device)]                # (B, h, w, p, p, 3)
        return patches.transpose(2, 3).reshape(B, h * p, w * p, 3)

    @classmethod
    def fit(cls, images: Tensor, n_codes: int = 256, patch: int = 2, rounds: int = 10, seed: int = 0) -> "Palette":
        """k-means on the patches of real images (uint8 (B, H, W, 3)); empty clusters restart at
        random patches.

        ValueError for n_codes or patch below 1, and for images that do not divide into patches.
        """
        if n_codes < 1 or patch < 1:
            raise ValueError(f"Palette.fit: n_codes and patch must be at least 1, got {n_codes} and {patch}")
        h, w = cut_patches(images[:1], patch).shape[1:3]  # raises what does not fit
        # a view (B, h, w, p, p, 3)
        patches = images.unflatten(2, (w, patch)).unflatten(1, (h, patch)).transpose(2, 3)
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(images) * h * w, generator=generator)[:50_000]
        # (M, 3 p p)
        vectors = patches[torch.unravel_index(chosen, patches.shape[:3])].flatten(1).float()
        centres = vectors.unique(dim=0)
        centres = centres[torch.randperm(len(centres), generator=generator)[:n_codes]]
        for _ in range(rounds):
            owner = nearest(vectors, centres)
            count = torch.bincount(owner, minlength=len(centres))
            mean = torch.zeros_like(centres).index_add_(0, owner, vectors) / count.clamp(min=1)[:, None]
            fresh = vectors[torch.randint(len(vectors), (len(centres),), generator=generator)]
            centres = torch.where(count[:, None] > 0, mean, fresh)
        return cls(centres.round().view(-1, patch, patch, 3))


class Codes:
    """Pictures that are codes of a tokenizer which is not here (Show-o's MAGVIT-v2, Emu3's): encode
    and decode leave them as they are. Pixels are the caller's.
    """
    patch = 1

    def __init__(self, n_codes: int):
        if n_codes < 1:
            raise ValueError(f"Codes: n_codes must be at least 1, got {n_codes}")
        self.n_codes = n_codes

    def encode(self, codes: Tensor) -> Tensor:
        """Integers (B, h, w) -> the same as long.

        ValueError for pixels and for a code outside [0, n_codes).
        """
        if codes.dim() != 3 or codes.is_floating_point():
            raise ValueError(f"this tokenizer knows pictures as integer codes (B, h, w), got {codes.dtype} "
                             f"{tuple(codes.shape)}: encode pixels with the tokenizer that the codes are of")
        check_codes(codes.long(), self.n_codes)
        return codes.long()

    decode = encode


def nearest(vectors: Tensor, centres: Tensor) -> Tensor:
    """argmin_c |v - c|^2, (M,) long; in pieces, so that the distances stay below 2^22 numbers."""
    step = max(1, 2**22 // len(centres))
    return torch.cat([torch.cdist(part, centres, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
                      for part in vectors.split(step)])


def cut_patches(images: Tensor, patch: int) -> Tensor:
    """uint8 (B, H, W, 3) -> float (B, H/p, W/p, 3 p p)."""
    if images.dim() != 4 or images.shape[3] != 3 or images.dtype != torch.uint8 or 0 in images.shape:
        raise ValueError(f"images must be uint8 (B, H, W, 3), got {images.dtype} {tuple(images.shape)}")
    B, H, W, _ = images.shape
    if H % patch or W % patch:
        raise ValueError(f"images of {H}x{W} pixels do not divide into patches of {patch}: resize them")
    return images.reshape(B, H // patch, patch, W // patch, patch, 3).transpose(2, 3).flatten(3).float()


def check_codes(codes: Tensor, n_codes: int) -> None:
    if codes.dtype != torch.long or codes.dim() != 3:
        raise ValueError(f"image codes must be long (B, h, w), got {codes.dtype} {tuple(codes.shape)}: .long() converts "
                         "other integers, codes[None] is a batch of one")
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= n_codes):
        raise ValueError(f"image codes lie in [{int(codes.min())}, {int(codes.max())}], expected [0, {n_codes})")


def load_codes(file, grid: tuple, n_codes: int):
    """An .npy of integers -> int32 (h, w); (1, h, w), and all h w in one row, are taken as well.
    ValueError for what is none, has another grid, or codes outside [0, n_codes).
    """
    try:
        codes = np.load(file, allow_pickle=False)
        sides = [side for side in codes.shape if side != 1]  # of an .npz: AttributeError
    except FileNotFoundError:
        raise
    except Exception as error:  # numpy's own text advises to load it unsafely
        raise ValueError(f"no .npy of numbers ({type(error).__name__})") from error
    h, w = grid
    if codes.dtype.kind not in "iu" or codes.size != h * w or sides not in ([n for n in grid if n != 1], [h * w]):
        raise ValueError(f"codes are integers ({h}, {w}), this is {codes.dtype} {codes.shape}")
    if codes.min() < 0 or codes.max() >= n_codes:
        raise ValueError(f"codes lie in [{codes.min()}, {codes.max()}], expected [0, {n_codes})")
    return codes.astype(np.int32).reshape(grid)

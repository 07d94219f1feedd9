"""Pictures as codes from 0, and back: the image codecs of a Tokenizer, beside vq.VQ.

    Palette    the nearest of some fixed patches
    Codes      pictures that are codes already

Each has .n_codes, .patch (pixels a side), .encode(pixels) -> codes and .decode(codes) -> pixels.

Legend: B pictures, H and W pixels, h and w rows and columns of codes, p patch side, M vectors.
"""

import numpy as np
import torch
from torch import Tensor


class Palette:
    """The codes are the nearest of n patches (n, p, p, 3) uint8: exact for pictures made of them.

    ValueError for another shape, and for values that are not whole numbers from 0 to 255.
    """

    def __init__(self, patches):
        self.patches = torch.as_tensor(patches, dtype=torch.uint8)
        shape = self.patches.shape
        if len(shape) != 4 or 0 in shape or shape[1] != shape[2] or shape[3] != 3:
            raise ValueError(f"Palette: patches must be (n, p, p, 3), got {tuple(shape)}")
        if (self.patches != torch.as_tensor(patches)).any():
            raise ValueError("Palette: patches must be whole numbers from 0 to 255: multiply "
                             "shares by 255 and round")
        self.n_codes, self.patch = shape[:2]

    def encode(self, images: Tensor) -> Tensor:
        """uint8 (B, H, W, 3) -> long (B, h, w). ValueError if H or W is no multiple of p."""
        vectors = cut_patches(images.to(self.patches.device), self.patch)       # (B, h, w, 3 p p)
        centres = self.patches.flatten(1).float()                               # (n, 3 p p)
        return nearest_centres(vectors.flatten(0, 2), centres).view(vectors.shape[:3])

    def decode(self, codes: Tensor) -> Tensor:
        """long (B, h, w) -> uint8 (B, h p, w p, 3). ValueError for a code outside [0, n)."""
        check_codes(codes, self.n_codes)
        (B, h, w), p = codes.shape, self.patch
        patches = self.patches[codes.to(self.patches.device)]  # (B, h, w, p, p, 3)
        return patches.transpose(2, 3).reshape(B, h * p, w * p, 3)

    @classmethod
    def fit(cls, images: Tensor, n_codes: int = 256, patch: int = 2, rounds: int = 10,
            seed: int = 0) -> "Palette":
        """k-means on the patches of images, uint8 (B, H, W, 3); empty clusters restart.

        ValueError for n_codes or patch below 1, and for images that do not divide into patches.
        """
        if n_codes < 1 or patch < 1:
            raise ValueError(f"Palette.fit: n_codes and patch must be at least 1, got {n_codes} "
                             f"and {patch}")
        h, w = cut_patches(images[:1], patch).shape[1:3]
        patches = images.unflatten(2, (w, patch)).unflatten(1, (h, patch)).transpose(2, 3)
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(images) * h * w, generator=generator)[:50_000]
        chosen = torch.unravel_index(chosen, patches.shape[:3])
        vectors = patches[chosen].flatten(1).float()  # (M, 3 p p)
        centres = vectors.unique(dim=0)
        centres = centres[torch.randperm(len(centres), generator=generator)[:n_codes]]
        for _ in range(rounds):
            owner = nearest_centres(vectors, centres)  # (M,)
            count = torch.bincount(owner, minlength=len(centres))[:, None]
            mean = torch.zeros_like(centres).index_add_(0, owner, vectors) / count.clamp(min=1)
            fresh = torch.randint(len(vectors), (len(centres),), generator=generator)
            centres = torch.where(count > 0, mean, vectors[fresh])
        return cls(centres.round().view(-1, patch, patch, 3))


class Codes:
    """Pictures that are codes of a tokenizer which is not here (Show-o's MAGVIT-v2, Emu3's).

    encode and decode leave them as they are; turning them into pixels is up to the caller.
    """
    patch = 1

    def __init__(self, n_codes: int):
        if n_codes < 1:
            raise ValueError(f"Codes: n_codes must be at least 1, got {n_codes}")
        self.n_codes = n_codes

    def encode(self, codes: Tensor) -> Tensor:
        """Integers (B, h, w) -> the same as long. ValueError for pixels and foreign codes."""
        if codes.dim() != 3 or codes.is_floating_point():
            raise ValueError("this tokenizer knows pictures as integer codes (B, h, w), got "
                             f"{codes.dtype} {tuple(codes.shape)}: encode pixels with the "
                             "tokenizer that the codes are of")
        check_codes(codes.long(), self.n_codes)
        return codes.long()

    decode = encode


def nearest_centres(vectors: Tensor, centres: Tensor) -> Tensor:
    """argmin_c |v - c|^2, (M,) long; in pieces, so that at most 2^22 distances are held."""
    pieces = vectors.split(max(1, 2**22 // len(centres)))
    exact = {"compute_mode": "donot_use_mm_for_euclid_dist"}
    return torch.cat([torch.cdist(piece, centres, **exact).argmin(1) for piece in pieces])


def cut_patches(images: Tensor, patch: int) -> Tensor:
    """uint8 (B, H, W, 3) -> float (B, H/p, W/p, 3 p p)."""
    pictures = images.dim() == 4 and images.shape[3] == 3 and images.numel() > 0
    if images.dtype != torch.uint8 or not pictures:
        raise ValueError(f"images must be uint8 (B, H, W, 3), got {images.dtype} "
                         f"{tuple(images.shape)}")
    B, H, W, _ = images.shape
    if H % patch or W % patch:
        raise ValueError(f"images of {H}x{W} pixels do not divide into patches of {patch}: resize "
                         "them")
    images = images.reshape(B, H // patch, patch, W // patch, patch, 3)
    return images.transpose(2, 3).flatten(3).float()


def check_codes(codes: Tensor, n_codes: int) -> None:
    """ValueError unless codes are long (B, h, w) in [0, n_codes)."""
    if codes.dtype != torch.long or codes.dim() != 3:
        raise ValueError(f"image codes must be long (B, h, w), got {codes.dtype} "
                         f"{tuple(codes.shape)}: .long() converts other integers, codes[None] is "
                         "a batch of one")
    if codes.numel() and not 0 <= codes.min() <= codes.max() < n_codes:
        raise ValueError(f"image codes lie in [{codes.min()}, {codes.max()}], expected "
                         f"[0, {n_codes})")


def load_codes(file, grid: tuple, n_codes: int) -> np.ndarray:
    """An .npy of integers (h, w), (1, h, w) or all h w in one row -> int32 (h, w).

    ValueError for another file, another grid, or codes outside [0, n_codes).
    """
    try:
        codes = np.load(file, allow_pickle=False)
        sides = [side for side in codes.shape if side != 1]  # of an .npz: AttributeError
    except FileNotFoundError:
        raise
    except Exception as error:  # numpy's own text advises to load it unsafely
        raise ValueError(f"no .npy of numbers ({type(error).__name__})") from error
    h, w = grid
    fits = sides in ([side for side in grid if side != 1], [h * w])
    if codes.dtype.kind not in "iu" or codes.size != h * w or not fits:
        raise ValueError(f"codes are integers ({h}, {w}), this is {codes.dtype} {codes.shape}")
    if codes.min() < 0 or codes.max() >= n_codes:
        raise ValueError(f"codes lie in [{codes.min()}, {codes.max()}], expected [0, {n_codes})")
    return codes.astype(np.int32).reshape(grid)

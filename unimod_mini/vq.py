"""A small trainable image tokenizer: pixels -> a grid of integer codes -> pixels.

A convolutional auto-encoder whose latents are snapped to one of C codes (VQ-VAE, van den Oord et
al. 2017, arXiv:1711.00937), with two quantizers, one for each backbone of this project:
- "nearest": a learnt codebook, the nearest vector in L2 is chosen, as in Emu3 (arXiv:2409.18869);
- "lfq": lookup-free, the signs of D = log2(C) channels are the bits of the code, as in MAGVIT-v2
  (arXiv:2310.05737), the tokenizer of Show-o. Its codebook is fixed: the corners of a cube.
Departures: no perceptual or adversarial loss, no time axis; codes that fall out of use restart.

Dimensions: B images, H x W pixels, p patch, h = H / p, w = W / p, D latent width, C codes,
N = B h w latents. Symbols: z a latent, e_c code c, q the code chosen for z, sg stop-gradient.
"""
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.special import entr

from .atomic_files import save_data
from .console import progress_bar

COMMITMENT, ENTROPY, PEAK_RATE = 0.25, 0.1, 6e-3  # two loss weights (L1 has 1), learning rate
FADE, DEAD = 0.1, 0.03  # rate of the running share of a code; below DEAD / C the code restarts
DISTANCES = 2**24  # numbers at a time: 64 MB
SAVE_EVERY = 200  # steps between two states of a training that can be stopped


class Quantized(NamedTuple):
    vectors: Tensor  # (B, D, h, w) float: the chosen codes, with the gradient of the latents
    codes: Tensor  # (B, h, w) long in [0, C)
    loss: Tensor  # () float: pulls latents and codes together


class VQReport(NamedTuple):
    error: float  # mean absolute error of the reconstruction on the 0..255 scale
    psnr: float  # peak signal-to-noise ratio in dB, inf when every pixel is right
    usage: float  # share of the C codes that occur at least once
    perplexity: float  # exp(entropy of the codes): how many are in use in effect, 1..C


def require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


class VQ(nn.Module):
    """A tokenizer with D = dim latent channels: 8 unless given, always log2(C) for "lfq".
    Raises ValueError for an unknown quantizer and for sizes that it cannot take."""

    def __init__(self, n_codes=512, patch=4, width=48, dim=None, quantizer="nearest"):
        super().__init__()
        lfq, bits, halvings = quantizer == "lfq", n_codes.bit_length() - 1, patch.bit_length() - 1
        self.dim = dim = dim or (bits if lfq else 8)
        require(lfq or quantizer == "nearest", f"quantizer {quantizer!r}: use 'nearest' or 'lfq'")
        require(n_codes > 1 and (not lfq or n_codes == 1 << bits),
                f"n_codes is {n_codes}, expected 2 or more, a power of two for 'lfq': try 512")
        require(patch > 0 and patch == 1 << halvings, f"patch {patch} is no power of two: try 4")
        require(min(width, dim) > 0, f"width is {width}, dim {dim}, expected 1 or more of each: try 48 and 8")
        require(dim == bits or not lfq, f"dim is {dim}, 'lfq' expects {bits}: leave dim out")
        self.n_codes, self.patch, self.width, self.quantizer = n_codes, patch, width, quantizer
        # Conv2d(in, out, kernel, stride, padding); each pair of layers halves or doubles the sides.
        down = [m for _ in range(halvings) for m in (nn.SiLU(), nn.Conv2d(width, width, 4, 2, 1))]
        up = [m for _ in down[::2] for m in (nn.SiLU(), nn.ConvTranspose2d(width, width, 4, 2, 1))]
        # (B, 3, H, W) -> (B, width, H, W) -> (B, width, h, w) -> (B, D, h, w), then the mirror.
        self.encoder = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1), *down, nn.GroupNorm(1, width),
                                     nn.SiLU(), nn.Conv2d(width, dim, 3, 1, 1))
        self.decoder = nn.Sequential(nn.Conv2d(dim, width, 3, 1, 1), nn.GroupNorm(1, width), *up,
                                     nn.SiLU(), nn.Conv2d(width, 3, 3, 1, 1))
        if lfq:  # e_c: bit i of c is the sign of channel i; e_5 = (+1, -1, +1), since 5 = 0b101
            signs = (torch.arange(n_codes)[:, None] >> torch.arange(bits)) % 2 * 2.0 - 1  # (C, D)
            self.register_buffer("codebook", signs, persistent=False)
        else:  # use: the running share of each code; 0 makes the first step restart them all
            self.codebook = nn.Parameter(torch.randn(n_codes, dim))
            self.register_buffer("use", torch.zeros(n_codes))

    def config(self) -> dict:
        """The arguments that rebuild this tokenizer: VQ(**config)."""
        return {k: getattr(self, k) for k in ("n_codes", "patch", "width", "dim", "quantizer")}

    def pixels(self, images: Tensor) -> Tensor:
        """uint8 (B, H, W, 3) -> float (B, 3, H, W) in -1..1; ValueError if they do not fit."""
        given, p = f"images are {images.dtype} {tuple(images.shape)}, expected ", self.patch
        fits = images.dtype == torch.uint8 and images.ndim == 4 and images.shape[3] == 3
        require(fits and images.numel() > 0, given + "torch.uint8 (B, H, W, 3), none of them 0: "
                "scale to 0..255, put the channels last")
        require(images.shape[1] % p == images.shape[2] % p == 0,
                given + f"H and W divisible by patch = {p}: crop, pad or resize them")
        return images.to(self.codebook.device).movedim(3, 1) / 127.5 - 1

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """uint8 (B, H, W, 3) -> long (B, h, w); ValueError if images do not fit.

        Not in autocast: bf16 codes differ.
        """
        with torch.autocast(self.codebook.device.type, enabled=False):
            return self.choose(self.encoder(self.pixels(images)).movedim(1, 3))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Long (B, h, w) -> uint8 (B, H, W, 3); ValueError if codes do not fit."""
        fits = codes.dtype == torch.long and codes.ndim == 3 and codes.numel() > 0
        require(fits, f"codes are {codes.dtype} {tuple(codes.shape)}, expected torch.int64 "
                "(B, h, w), none of them 0: use .long() and reshape each image to its grid")
        require(codes.min() >= 0 and codes.max() < self.n_codes, f"codes span {codes.min()}.."
                f"{codes.max()}, expected 0..{self.n_codes - 1}: subtract the image id offset")
        q = self.codebook[codes.to(self.codebook.device)]  # (B, h, w, D)
        with torch.autocast(q.device.type, enabled=False):
            pixels = self.decoder(q.movedim(3, 1)).clamp(-1, 1).movedim(1, 3)  # (B, H, W, 3)
        return ((pixels + 1) * 127.5).round().to(torch.uint8).contiguous()

    def choose(self, z: Tensor) -> Tensor:
        """The code of each latent, float (..., D) -> long (...)."""
        if self.quantizer == "lfq":  # c = sum_i [z_i > 0] 2^i
            return ((z > 0) * 2 ** torch.arange(self.dim, device=z.device)).sum(-1)
        # c = argmin |z - e_c|^2 = argmin |e_c|^2 - 2 z . e_c, for some latents at a time
        square, step = self.codebook.square().sum(-1), max(1, DISTANCES // self.n_codes)
        return torch.cat([(square - 2 * part @ self.codebook.T).argmin(-1)
                          for part in z.reshape(-1, z.shape[-1]).split(step)]).view(z.shape[:-1])

    def quantize(self, latents: Tensor) -> Quantized:
        """Snap float latents (B, D, h, w) to their codes, differentiably."""
        z = latents.movedim(1, 3)  # (B, h, w, D)
        codes = self.choose(z)
        q = self.codebook[codes]  # (B, h, w, D)
        loss = COMMITMENT * F.mse_loss(z, q.detach())  # |z - sg(q)|^2: latents stay by their code
        if self.quantizer == "lfq":
            # p(c | z) = softmax_c(-|z - e_c|^2) = softmax_c(2 z . e_c), as all |e_c| are equal
            p = (2 * z @ self.codebook.T).softmax(-1).clamp_min(1e-12).flatten(0, 2)  # (N, C)
            # E H(p(c | z)) - H(E p(c | z)): each latent is sure of its code, all codes are used
            loss = loss + ENTROPY * (entr(p).sum(-1).mean() - entr(p.mean(0)).sum())
        else:
            loss = loss + F.mse_loss(q, z.detach())  # |sg(z) - q|^2: codes move to their latents
        vectors = z + (q - z).detach()  # z + sg(q - z): the value of q, the gradient of z
        return Quantized(vectors.movedim(3, 1), codes, loss)

    @torch.no_grad()
    def restart(self, latents: Tensor, codes: Tensor, generator: torch.Generator) -> None:
        """Move dead codes onto latents drawn with P(z) ~ |z - q|^2: the worst served go first."""
        z, codes = latents.movedim(1, 3).flatten(0, 2), codes.flatten()  # (N, D), (N,)
        miss = (z - self.codebook[codes]).square().sum(-1) + 1e-9  # (N,)
        rows = torch.multinomial(miss.cpu(), self.n_codes, True, generator=generator)  # (C,)
        dead = self.use < DEAD / self.n_codes  # (C,) bool
        self.codebook[dead], self.use[dead] = z[rows.to(z.device)][dead], 1 / self.n_codes
        self.use.lerp_(torch.bincount(codes, minlength=self.n_codes) / len(codes), FADE)


def fit_vq(images: Tensor, vq: VQ, steps: int, seed=0, batch=32, progress=True, state=None) -> VQReport:
    """train_vq, and a report on those same images."""
    train_vq(images, vq, steps, seed, batch, progress, state)
    return measure(images, vq)


def train_vq(images: Tensor, vq: VQ, steps: int, seed=0, batch=32, progress=True, state=None) -> None:
    """Train vq in place on uint8 images (B, H, W, 3). seed fixes batches and restarts; the first
    weights are those of vq, the global generator is left alone.
    state: a file that the training is written to every SAVE_EVERY steps; if it is there, training
    goes on from it, with the same arguments to the same weights.
    Raises ValueError for images that do not fit, steps < 1 or batch < 1."""
    vq.pixels(images[:1] if images.ndim == 4 else images)  # fail before the training, not in it
    require(min(steps, batch) > 0, f"steps {steps}, batch {batch}: expected 1 or more of each")
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(vq.parameters(), betas=(0.9, 0.95))
    done = load_training(state, vq, optimizer, generator) if state and Path(state).exists() else 0
    steps_left = range(done, steps)
    for step in (bar := progress_bar(steps_left, "fit vq", steps, initial=done, disable=not progress)):
        # the rate climbs for a tenth of the steps, then falls to zero
        optimizer.param_groups[0]["lr"] = PEAK_RATE * min(10 * (step + 1) / steps, 1 - step / steps)
        pixels = vq.pixels(images[torch.randint(len(images), (batch,), generator=generator)])
        latents = vq.encoder(pixels)  # (B, D, h, w)
        chosen = vq.quantize(latents)
        loss = F.l1_loss(vq.decoder(chosen.vectors), pixels) + chosen.loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if vq.quantizer == "nearest":
            vq.restart(latents, chosen.codes, generator)
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if state and (step + 1) % SAVE_EVERY == 0:
            save_training(state, step + 1, vq, optimizer, generator)


def save_training(path, done: int, vq: VQ, optimizer, generator: torch.Generator) -> None:
    save_data(path, {"done": done, "vq": vq.state_dict(), "optimizer": optimizer.state_dict(),
                     "generator": generator.get_state()})


def load_training(path, vq: VQ, optimizer, generator: torch.Generator) -> int:
    """Fills all three with what save_training wrote; returns the steps done."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    vq.load_state_dict(state["vq"])
    optimizer.load_state_dict(state["optimizer"])
    generator.set_state(state["generator"])
    return state["done"]


def measure(images: Tensor, vq: VQ) -> VQReport:
    """Reconstruct uint8 images (B, H, W, 3), count the codes; ValueError if they do not fit."""
    absolute, square, counts = 0, 0, torch.zeros(vq.n_codes, dtype=torch.long)
    for part in images.split(64):  # sums of whole numbers: the pieces change no figure
        codes = vq.encode(part)
        miss = vq.decode(codes).cpu().int() - part.cpu()
        absolute, square = absolute + miss.abs().sum(), square + miss.square().sum()
        counts += torch.bincount(codes.flatten(), minlength=vq.n_codes).cpu()
    error = absolute / images.numel()
    psnr = 10 * torch.log10(255**2 * images.numel() / square)  # 10 log10(255^2 / MSE)
    usage, perplexity = (counts > 0).float().mean(), entr(counts / counts.sum()).sum().exp()
    return VQReport(*(x.item() for x in (error, psnr, usage, perplexity)))

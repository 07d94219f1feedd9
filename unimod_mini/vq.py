"""A small trainable image tokenizer: pixels -> a grid of integer codes -> pixels.

A convolutional auto-encoder whose latents are replaced by one of C codes (VQ-VAE, van den Oord et
al. 2017, arXiv 1711.00937). Each backbone of this project has its quantizer:

    "nearest"   a learnt codebook; the nearest vector in L2 is chosen: Emu3 (arXiv 2409.18869)
    "lfq"       lookup-free: the signs of D = log2(C) channels are the bits of the code, the
                codebook is the corners of a cube: MAGVIT-v2 (arXiv 2310.05737), in Show-o

Departure from both: no perceptual or adversarial loss, no time axis; unused codes restart.

Legend: B images, H x W pixels, p patch side, h = H / p, w = W / p, D latent width, C codes,
        N = B h w latents; z a latent, e_c code c, q the code chosen for z, sg stop-gradient.
"""

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.special import entr

from .atomic_files import save_data
from .console import progress_bar

COMMITMENT, ENTROPY = 0.25, 0.1   # weights of losses; the reconstruction (L1) has 1
PEAK_RATE = 6e-3                  # learning rate
FADE, DEAD = 0.1, 0.03            # rate of a code's running share; below DEAD / C it restarts
DISTANCES = 2**24                 # distances held at a time: 64 MB
SAVE_EVERY = 200                  # steps between two saved states of a training


class Quantized(NamedTuple):
    vectors: Tensor   # (B, D, h, w) float: the chosen codes, with the gradient of the latents
    codes: Tensor     # (B, h, w) long in [0, C)
    loss: Tensor      # () float: pulls latents and codes together


class VQReport(NamedTuple):
    error: float        # mean absolute error of the reconstruction, on the 0..255 scale
    psnr: float         # peak signal-to-noise ratio in dB, inf if every pixel is right
    usage: float        # share of the C codes that occur
    perplexity: float   # exp(entropy of the codes): the number in effective use, 1..C


class VQ(nn.Module):
    """A tokenizer. dim: latent width D, by default 8; "lfq" always has log2(C).

    ValueError for an unknown quantizer and for sizes that it cannot take.
    """

    def __init__(self, n_codes=512, patch=4, width=48, dim=None, quantizer="nearest"):
        super().__init__()
        bits, halvings = n_codes.bit_length() - 1, patch.bit_length() - 1
        lfq = quantizer == "lfq"
        if quantizer not in ("nearest", "lfq"):
            raise ValueError(f"quantizer {quantizer!r}: use 'nearest' or 'lfq'")
        if n_codes < 2 or (lfq and n_codes != 2**bits):
            raise ValueError(f"n_codes is {n_codes}, expected 2 or more, a power of two for 'lfq'")
        if patch < 1 or patch != 2**halvings:
            raise ValueError(f"patch {patch} is no power of two")
        self.n_codes, self.patch, self.width, self.quantizer = n_codes, patch, width, quantizer
        self.dim = dim = bits if lfq else dim or 8

        down, up = [], []  # Conv2d(in, out, kernel, stride, padding) halves the sides
        for _ in range(halvings):
            down += [nn.SiLU(), nn.Conv2d(width, width, 4, 2, 1)]
        for _ in range(halvings):
            up += [nn.SiLU(), nn.ConvTranspose2d(width, width, 4, 2, 1)]
        self.encoder = nn.Sequential(  # (B, 3, H, W) -> (B, D, h, w)
            nn.Conv2d(3, width, 3, 1, 1), *down,
            nn.GroupNorm(1, width), nn.SiLU(), nn.Conv2d(width, dim, 3, 1, 1))
        self.decoder = nn.Sequential(  # (B, D, h, w) -> (B, 3, H, W)
            nn.Conv2d(dim, width, 3, 1, 1), nn.GroupNorm(1, width), *up,
            nn.SiLU(), nn.Conv2d(width, 3, 3, 1, 1))
        if lfq:
            # bit i of c is the sign of channel i: e_5 = (+1, -1, +1), since 5 = 0b101
            signs = (torch.arange(n_codes)[:, None] >> torch.arange(bits)) % 2 * 2.0 - 1  # (C, D)
            self.register_buffer("codebook", signs, persistent=False)
        else:
            self.codebook = nn.Parameter(torch.randn(n_codes, dim))
            # running share of each code; 0: all restart in the first step
            self.register_buffer("use", torch.zeros(n_codes))

    def config(self) -> dict:
        """The arguments that rebuild this tokenizer: VQ(**config)."""
        names = ("n_codes", "patch", "width", "dim", "quantizer")
        return {name: getattr(self, name) for name in names}

    def pixels(self, images: Tensor) -> Tensor:
        """uint8 (B, H, W, 3) -> float (B, 3, H, W) in -1..1; ValueError if they do not fit."""
        given = f"images are {images.dtype} {tuple(images.shape)}, expected"
        pictures = images.ndim == 4 and images.shape[3] == 3 and images.numel() > 0
        if images.dtype != torch.uint8 or not pictures:
            raise ValueError(f"{given} torch.uint8 (B, H, W, 3), none of them 0: scale to 0..255, "
                             "put the channels last")
        if images.shape[1] % self.patch or images.shape[2] % self.patch:
            raise ValueError(f"{given} H and W divisible by patch = {self.patch}: crop, pad or "
                             "resize them")
        return images.to(self.codebook.device).movedim(3, 1) / 127.5 - 1

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """uint8 (B, H, W, 3) -> codes long (B, h, w); ValueError if they do not fit."""
        with torch.autocast(self.codebook.device.type, enabled=False):  # bf16 codes would differ
            return self.choose(self.encoder(self.pixels(images)).movedim(1, 3))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes long (B, h, w) -> uint8 (B, H, W, 3); ValueError if they do not fit."""
        if codes.dtype != torch.long or codes.ndim != 3 or not codes.numel():
            raise ValueError(f"codes are {codes.dtype} {tuple(codes.shape)}, expected torch.int64 "
                             "(B, h, w), none of them 0: use .long() and reshape each image")
        if codes.min() < 0 or codes.max() >= self.n_codes:
            raise ValueError(f"codes span {codes.min()}..{codes.max()}, expected "
                             f"0..{self.n_codes - 1}: subtract the image id offset")
        q = self.codebook[codes.to(self.codebook.device)]  # (B, h, w, D)
        with torch.autocast(q.device.type, enabled=False):
            pixels = self.decoder(q.movedim(3, 1)).clamp(-1, 1).movedim(1, 3)
        return ((pixels + 1) * 127.5).round().to(torch.uint8).contiguous()

    def choose(self, z: Tensor) -> Tensor:
        """The code of each latent, float (.., D) -> long (..)."""
        if self.quantizer == "lfq":
            # c = sum_i [z_i > 0] 2^i
            return ((z > 0) * 2 ** torch.arange(self.dim, device=z.device)).sum(-1)
        # c = argmin_c |z - e_c|^2 = argmin_c |e_c|^2 - 2 z . e_c
        square = self.codebook.square().sum(-1)  # (C,)
        pieces = z.reshape(-1, z.shape[-1]).split(max(1, DISTANCES // self.n_codes))
        codes = [(square - 2 * piece @ self.codebook.T).argmin(-1) for piece in pieces]
        return torch.cat(codes).view(z.shape[:-1])

    def quantize(self, latents: Tensor) -> Quantized:
        """Replaces float latents (B, D, h, w) by their codes, differentiably."""
        z = latents.movedim(1, 3)  # (B, h, w, D)
        codes = self.choose(z)
        q = self.codebook[codes]  # (B, h, w, D)
        # |z - sg(q)|^2: latents stay close to their code
        loss = COMMITMENT * F.mse_loss(z, q.detach())
        if self.quantizer == "lfq":
            # p(c | z) = softmax_c(-|z - e_c|^2) = softmax_c(2 z . e_c), as all |e_c| are equal
            p = (2 * z @ self.codebook.T).softmax(-1).clamp_min(1e-12).flatten(0, 2)  # (N, C)
            # E H(p(c | z)) - H(E p(c | z)): each latent is sure of its code, all codes are used
            loss = loss + ENTROPY * (entr(p).sum(-1).mean() - entr(p.mean(0)).sum())
        else:
            # |sg(z) - q|^2: codes move to their latents
            loss = loss + F.mse_loss(q, z.detach())
        # z + sg(q - z): the value of q, the gradient of z
        vectors = z + (q - z).detach()
        return Quantized(vectors.movedim(3, 1), codes, loss)

    @torch.no_grad()
    def restart(self, latents: Tensor, codes: Tensor, generator: torch.Generator) -> None:
        """Moves dead codes onto latents (B, D, h, w), drawn with P(z) ~ |z - q|^2."""
        z, codes = latents.movedim(1, 3).flatten(0, 2), codes.flatten()  # (N, D), (N,)
        miss = (z - self.codebook[codes]).square().sum(-1) + 1e-9        # (N,)
        rows = torch.multinomial(miss.cpu(), self.n_codes, True, generator=generator)  # (C,)
        dead = self.use < DEAD / self.n_codes  # (C,) bool
        self.codebook[dead] = z[rows.to(z.device)][dead]
        self.use[dead] = 1 / self.n_codes
        self.use.lerp_(torch.bincount(codes, minlength=self.n_codes) / len(codes), FADE)


def train_vq(images: Tensor, vq: VQ, steps: int, seed=0, batch=32, progress=True, state=None):
    """Trains vq in place on uint8 images (B, H, W, 3).

    seed: of batches and restarts; the global generator is left alone. state: a file that holds the
    training every SAVE_EVERY steps; if it is there, training goes on from it, with the same
    arguments to the same weights. ValueError for images that do not fit, steps or batch below 1.
    """
    vq.pixels(images[:1] if images.ndim == 4 else images)  # fails before the training
    if min(steps, batch) < 1:
        raise ValueError(f"steps {steps}, batch {batch}: expected 1 or more of each")
    generator, done = torch.Generator().manual_seed(seed), 0
    optimizer = torch.optim.Adam(vq.parameters(), betas=(0.9, 0.95))
    if state and Path(state).exists():
        stored = torch.load(state, map_location="cpu", weights_only=True)
        done = stored["done"]
        vq.load_state_dict(stored["vq"])
        optimizer.load_state_dict(stored["optimizer"])
        generator.set_state(stored["generator"])
    bar = progress_bar(range(done, steps), "fit vq", steps, initial=done, disable=not progress)
    for step in bar:
        # the rate climbs for a tenth of the steps, then falls to zero
        rate = PEAK_RATE * min(10 * (step + 1) / steps, 1 - step / steps)
        optimizer.param_groups[0]["lr"] = rate
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
            save_data(state, {"done": step + 1, "vq": vq.state_dict(),
                              "optimizer": optimizer.state_dict(),
                              "generator": generator.get_state()})


def measure(images: Tensor, vq: VQ) -> VQReport:
    """Reconstructs uint8 images (B, H, W, 3) and counts the codes."""
    absolute, square, counts = 0, 0, torch.zeros(vq.n_codes, dtype=torch.long)
    for part in images.split(64):
        codes = vq.encode(part)
        miss = vq.decode(codes).cpu().int() - part.cpu()
        absolute += miss.abs().sum()
        square += miss.square().sum()
        counts += torch.bincount(codes.flatten(), minlength=vq.n_codes).cpu()
    # PSNR = 10 log10(255^2 / MSE)
    psnr = 10 * torch.log10(255**2 * images.numel() / square)
    usage, perplexity = (counts > 0).float().mean(), entr(counts / counts.sum()).sum().exp()
    error = absolute / images.numel()
    return VQReport(error.item(), psnr.item(), usage.item(), perplexity.item())

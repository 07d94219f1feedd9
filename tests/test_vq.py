"""unimod_mini.vq: the trainable image tokenizer and its quantizers against slow, obvious twins."""
import io
import itertools
import json
import math
import tempfile
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unimod_mini import vq as module
from unimod_mini.vq import VQ, measure, train_vq

QUANTIZERS = ("nearest", "lfq")


def blocks(n, side=16, seed=0):
    """n images (n, side, side, 3) of one coloured rectangle on a coloured ground, in 6 colours."""
    generator = torch.Generator().manual_seed(seed)

    def draw(k):
        return int(torch.randint(k, (1,), generator=generator))

    palette = torch.tensor([[230, 30, 30], [30, 200, 60], [40, 60, 230], [240, 220, 40],
                            [20, 20, 20], [240, 240, 240]], dtype=torch.uint8)
    images = torch.empty(n, side, side, 3, dtype=torch.uint8)
    for image in images:
        image[:] = palette[draw(6)]
        top, left = draw(side // 2), draw(side // 2)
        image[top:top + 4 + draw(6), left:left + 4 + draw(6)] = palette[draw(6)]
    return images


def build(quantizer, seed=0, **sizes):
    """A small tokenizer with weights fixed by seed."""
    torch.manual_seed(seed)
    return VQ(**{"n_codes": 16, "patch": 4, "width": 8, **sizes}, quantizer=quantizer)


def noise(*shape, seed=0):
    """uint8 noise of a shape."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, shape, generator=generator, dtype=torch.uint8)


def fit(images, vq, **options):
    """Trains vq and measures it on the same images."""
    train_vq(images, vq, **{"progress": False} | options)
    return measure(images, vq)


# ---------------------------------------------------------------- encode and decode

@given(quantizer=st.sampled_from(QUANTIZERS), patch=st.sampled_from([1, 2, 4, 8]),
       bits=st.integers(1, 7), batch=st.integers(1, 3), rows=st.integers(1, 4),
       columns=st.integers(1, 4), seed=st.integers(0, 99))
def test_shapes_dtypes_and_range(quantizer, patch, bits, batch, rows, columns, seed):
    """uint8 (B, h p, w p, 3) -> long (B, h, w) in [0, C) -> uint8 (B, h p, w p, 3), no gradient."""
    vq = build(quantizer, seed, n_codes=2**bits, patch=patch, width=4)
    assert (vq.n_codes, vq.patch) == (2**bits, patch)
    images = noise(batch, rows * patch, columns * patch, 3, seed=seed)
    codes = vq.encode(images)
    assert codes.shape == (batch, rows, columns) and codes.dtype == torch.long
    assert 0 <= codes.min() and codes.max() < 2**bits
    decoded = vq.decode(codes)
    assert decoded.shape == images.shape and decoded.dtype == torch.uint8
    assert codes.is_contiguous() and decoded.is_contiguous() and not decoded.requires_grad


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_every_code_decodes(quantizer):
    """Every id in [0, C) is legal, whether or not an image produces it, and looks different."""
    vq = build(quantizer)
    decoded = vq.decode(torch.arange(16).view(16, 1, 1))
    assert decoded.shape == (16, 4, 4, 3)
    assert len(decoded.flatten(1).unique(dim=0)) == 16


def test_pixels_cover_the_range():
    """0 -> -1, 255 -> 1, and decoding saturates instead of wrapping around."""
    vq = build("nearest")
    ramp = torch.tensor([0, 255, 51], dtype=torch.uint8).expand(1, 4, 4, 3)
    assert vq.pixels(ramp)[0, :, 0, 0].tolist() == pytest.approx([-1, 1, -0.6])
    with torch.no_grad():
        vq.decoder[-1].weight.zero_()
        vq.decoder[-1].bias.copy_(torch.tensor([-7.0, 7.0, -0.6]))
    assert vq.decode(torch.zeros(1, 1, 1, dtype=torch.long))[0, 0, 0].tolist() == [0, 255, 51]


# ---------------------------------------------------------------- quantizers against their twins

@given(bits=st.integers(1, 8), seed=st.integers(0, 999))
def test_lfq_codes_are_sign_bits(bits, seed):
    """Bit i of the code is 1 where channel i is positive (0 counts as negative), least first."""
    vq = build("lfq", n_codes=2**bits)
    z = torch.randint(-2, 3, (2, bits, 2, 3), generator=torch.Generator().manual_seed(seed)).float()
    chosen = vq.quantize(z)
    for b in range(2):
        for y in range(2):
            for x in range(3):
                signs = ["1" if z[b, i, y, x] > 0 else "0" for i in range(bits)]
                assert chosen.codes[b, y, x] == int("".join(reversed(signs)), 2)
    assert torch.equal(chosen.vectors, torch.where(z > 0, 1.0, -1.0))


def test_lfq_is_nearest_among_the_corners_of_the_cube():
    """The table of codes is the whole cube, and a sign is the nearest corner: e_5 = (+, -, +)."""
    vq = build("lfq", n_codes=8)
    assert vq.codebook[5].tolist() == [1, -1, 1] and len(vq.codebook.unique(dim=0)) == 8
    z = torch.randn(1, 3, 5, 5)
    distances = (z.movedim(1, 3)[..., None, :] - vq.codebook).square().sum(-1)  # (1, 5, 5, 8)
    assert torch.equal(vq.quantize(z).codes, distances.argmin(-1))


@given(n_codes=st.integers(2, 20), dim=st.integers(1, 5), seed=st.integers(0, 999))
def test_nearest_matches_brute_force(n_codes, dim, seed):
    """The code is the first of the nearest vectors. Integers make it exact, and ties frequent."""
    vq, generator = build("nearest", n_codes=n_codes, dim=dim), torch.Generator().manual_seed(seed)
    vq.codebook.data = torch.randint(-3, 4, (n_codes, dim), generator=generator).float()
    z = torch.randint(-4, 5, (2, dim, 2, 3), generator=generator).float()
    chosen = vq.quantize(z)
    for b in range(2):
        for y in range(2):
            for x in range(3):
                distances = []
                for code in vq.codebook.tolist():
                    pairs = zip(z[b, :, y, x].tolist(), code)
                    distances.append(sum((a - e) ** 2 for a, e in pairs))
                best = distances.index(min(distances))
                assert chosen.codes[b, y, x] == best
                assert torch.equal(chosen.vectors[b, :, y, x], vq.codebook[best])


@pytest.mark.parametrize("limit", (1, 7, 40, 2**24))
def test_distances_come_in_pieces(monkeypatch, limit):
    """However few distances are held at once, the codes are the same."""
    vq = build("nearest").double()
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 3, 5, vq.dim, dtype=torch.float64, generator=generator)
    whole = (z[..., None, :] - vq.codebook).square().sum(-1).argmin(-1)
    monkeypatch.setattr(module, "DISTANCES", limit)
    assert torch.equal(vq.choose(z), whole) and vq.choose(z[0, 0, 0]) == whole[0, 0, 0]


def test_decode_reads_the_codebook():
    """decode(codes) is the decoder on the vectors that quantize chose, rounded to uint8."""
    for quantizer in QUANTIZERS:
        vq = build(quantizer)
        chosen = vq.quantize(torch.randn(2, vq.dim, 3, 2))
        pixels = vq.decoder(chosen.vectors).movedim(1, 3).clamp(-1, 1)
        miss = vq.decode(chosen.codes).float() - (pixels + 1) * 127.5
        assert miss.abs().max() < 0.501


# ---------------------------------------------------------------- losses and gradients

@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_straight_through_gradient(quantizer):
    """The gradient at the vectors arrives at the latents unchanged, and none of it at the codes."""
    vq = build(quantizer)
    z = torch.randn(2, vq.dim, 2, 2, requires_grad=True)
    weight = torch.randn(2, vq.dim, 2, 2)
    (vq.quantize(z).vectors * weight).sum().backward()
    assert torch.equal(z.grad, weight)
    assert vq.codebook.grad is None


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_reconstruction_alone_trains_the_encoder(quantizer):
    """Without the quantizer's own loss, every weight of the encoder still gets a gradient."""
    vq = build(quantizer)
    pixels = vq.pixels(noise(2, 8, 8, 3))
    (vq.decoder(vq.quantize(vq.encoder(pixels)).vectors) - pixels).abs().mean().backward()
    for name, weight in vq.encoder.named_parameters():
        assert weight.grad.abs().max() > 0, name


def test_nearest_loss_pulls_both_ways():
    """loss = 1.25 mean |z - q|^2; a latent feels 0.25 of it, its code the rest, others nothing."""
    vq = build("nearest", n_codes=4, dim=2)
    vq.codebook.data = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0], [9.0, 9.0]])
    z = torch.tensor([[1.0, 0.0], [5.0, 1.0]]).T.reshape(1, 2, 1, 2)  # codes 0 and 1
    z.requires_grad_()
    loss = vq.quantize(z).loss
    loss.backward()
    assert loss.item() == pytest.approx(1.25 * (1 + 1 + 1) / 4)
    step = torch.tensor([[1.0, 0.0], [1.0, 1.0]]) * 2 / 4  # d mean |z - q|^2 / dz
    assert torch.allclose(z.grad.view(2, 2).T, 0.25 * step)
    assert torch.allclose(vq.codebook.grad, torch.cat([-step, torch.zeros(2, 2)]))


def test_lfq_loss_matches_a_loop_over_codes():
    """The entropies agree with p(c | z) built bit by bit: P(bit i = 1) = sigmoid(4 z_i)."""
    vq = build("lfq", n_codes=8)
    z = torch.randn(2, 3, 2, 2)
    table = []                             # a row a latent, a column a code
    for latent in z.movedim(1, 3).reshape(-1, 3).tolist():
        row = [1.0] * 8
        for i, v in enumerate(latent):
            up = 1 / (1 + math.exp(-4 * v))
            row = [p * (up if c >> i & 1 else 1 - up) for c, p in enumerate(row)]
        table.append(row)

    def entropy(row):
        return -sum(p * math.log(p) for p in row)

    each = sum(map(entropy, table)) / len(table)
    mean = entropy([sum(column) / len(table) for column in zip(*table)])
    commitment = (z - z.sign()).square().mean().item()
    expected = 0.25 * commitment + 0.1 * (each - mean)
    assert vq.quantize(z).loss.item() == pytest.approx(expected, abs=1e-5)


def test_lfq_entropy_prefers_many_codes():
    """Equally sure latents cost 0.1 log C less when spread over all C codes than on one."""
    vq = build("lfq", n_codes=8)
    spread = 3 * vq.codebook.T.reshape(1, 3, 2, 4)
    together = spread[:, :, :1, :1].expand(1, 3, 2, 4)
    saved = vq.quantize(together).loss - vq.quantize(spread).loss
    assert saved.item() == pytest.approx(0.1 * math.log(8), abs=1e-3)


def test_lfq_loss_is_finite_for_extreme_latents():
    """Latents so large that probabilities underflow give a finite loss and finite gradients."""
    vq = build("lfq", n_codes=8)
    z = (1e3 * torch.randn(1, 3, 2, 2)).requires_grad_()
    vq.quantize(z).loss.backward()
    assert torch.isfinite(z.grad).all()


# ---------------------------------------------------------------- restarts

def test_restart_moves_dead_codes_to_badly_served_latents():
    """Codes below the share go to far latents, live ones stay, and shares follow the counts."""
    vq = build("nearest", n_codes=4, dim=1)
    vq.codebook.data = torch.tensor([[0.0], [10.0], [50.0], [60.0]])
    vq.use.copy_(torch.tensor([0.5, 0.5, 0.0, 0.001]))
    z = torch.tensor([0.0, 0.0, 0.0, 20.0]).view(1, 1, 2, 2)  # three served exactly, one 10 off
    vq.restart(z, vq.quantize(z).codes, torch.Generator().manual_seed(0))
    assert vq.codebook.flatten().tolist() == [0, 10, 20, 20]
    expected = [0.9 * 0.5 + 0.1 * 0.75, 0.9 * 0.5 + 0.1 * 0.25, 0.9 / 4, 0.9 / 4]
    assert vq.use.tolist() == pytest.approx(expected)


def test_restart_handles_latents_that_are_all_served():
    """When every latent sits on a code, dead codes still find a latent to sit on."""
    vq = build("nearest", n_codes=4, dim=1)
    vq.codebook.data = torch.tensor([[1.0], [2.0], [70.0], [80.0]])
    vq.use.copy_(torch.tensor([0.5, 0.5, 0.0, 0.0]))
    z = torch.tensor([1.0, 2.0]).view(1, 1, 1, 2)
    vq.restart(z, vq.quantize(z).codes, torch.Generator().manual_seed(0))
    assert set(vq.codebook.flatten().tolist()) == {1.0, 2.0}


# ---------------------------------------------------------------- training

@pytest.fixture(scope="module", params=QUANTIZERS)
def trained(request):
    """(quantizer, images, vq, report) after seconds of training."""
    images, vq = blocks(64), build(request.param, n_codes=32, width=16)
    return request.param, images, vq, fit(images, vq, steps=300)


def test_training_beats_the_mean_colour(trained):
    """The error ends far below that of the mean colour, and most codes are used."""
    _, images, _, report = trained
    mean = images.float().mean((0, 1, 2))
    assert report.error < 0.4 * (images - mean).abs().mean()
    assert report.usage > 0.8 and report.perplexity > 12


def test_training_helps_on_unseen_images(trained):
    """Images from the same source that were not trained on are also rebuilt."""
    quantizer, images, vq, _ = trained
    unseen, fresh = blocks(64, seed=1), build(quantizer, n_codes=32, width=16)
    assert measure(unseen, vq).error < 0.5 * (unseen - images.float().mean((0, 1, 2))).abs().mean()
    assert measure(unseen, vq).error < 0.5 * measure(unseen, fresh).error


def test_report_agrees_with_the_tokenizer(trained):
    """Every figure of the report can be recomputed from encode and decode."""
    _, images, vq, report = trained
    codes = vq.encode(images)
    miss = vq.decode(codes).double() - images
    assert report.error == pytest.approx(miss.abs().mean().item(), rel=1e-4)
    root = miss.square().mean().sqrt().item()
    assert report.psnr == pytest.approx(20 * math.log10(255 / root), rel=1e-4)
    assert report.usage == pytest.approx(len(codes.unique()) / 32)
    shares = [(codes == c).double().mean().item() for c in codes.unique()]
    entropy = -sum(p * math.log(p) for p in shares)
    assert report.perplexity == pytest.approx(math.exp(entropy), rel=1e-4)


def test_without_restarts_the_codebook_collapses(trained, monkeypatch):
    """The restarts are what keeps a learnt codebook in use: without them far fewer codes occur."""
    quantizer, images, _, report = trained
    if quantizer == "lfq":
        monkeypatch.setattr(module, "ENTROPY", 0.0)  # its part is played by the entropy penalty
    monkeypatch.setattr(VQ, "restart", lambda *_: None)
    worse = fit(images, build(quantizer, n_codes=32, width=16), steps=60)
    assert worse.usage < 0.6 * report.usage


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_seed_fixes_the_run(quantizer):
    """Same start and seed, same weights; another seed, others; the global RNG is untouched."""
    images = blocks(8, side=8)

    def run(seed):
        vq = build(quantizer)
        before = torch.random.get_rng_state()
        fit(images, vq, steps=3, seed=seed, batch=4)
        assert torch.equal(before, torch.random.get_rng_state())
        return torch.cat([weight.flatten() for weight in vq.parameters()])

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@settings(max_examples=4)
@given(stop=st.integers(1, 7))
def test_a_stopped_fit_goes_on_to_the_same_weights(quantizer, stop):
    """Stopped in any step and begun anew with its file, a training ends with the same weights."""
    images = blocks(8, side=8)
    once = build(quantizer)
    fit(images, once, steps=7, batch=4)
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(module, "SAVE_EVERY", 2)
        steps, quantize = itertools.count(1), VQ.quantize

        def stops(vq, latents):
            if next(steps) == stop:
                raise KeyboardInterrupt
            return quantize(vq, latents)

        patch.setattr(VQ, "quantize", stops)
        state = Path(folder, "training.pt")
        with pytest.raises(KeyboardInterrupt):
            fit(images, build(quantizer), steps=7, batch=4, state=state)
        assert state.exists() == (stop > 2)
        twice = build(quantizer)
        fit(images, twice, steps=7, batch=4, state=state)
        # what was saved is not done again
        assert next(steps) == stop + 7 - (stop - 1) // 2 * 2 + 1
    assert all(map(torch.equal, once.state_dict().values(), twice.state_dict().values()))


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_smallest_fit(quantizer):
    """One step on one image of one patch works, also with a batch larger than the set."""
    vq = build(quantizer)
    before = vq.encoder[0].weight.clone()
    report = fit(noise(1, 4, 4, 3), vq, steps=1, batch=2)
    assert report.usage == pytest.approx(1 / 16) and report.perplexity == pytest.approx(1)
    assert not torch.equal(before, vq.encoder[0].weight)


class Grey:
    """A perfect tokenizer for grey images of 4 levels, one code a pixel."""
    n_codes = 4
    encode = staticmethod(lambda images: images[..., 0].long())
    decode = staticmethod(lambda codes: codes[..., None].expand(-1, -1, -1, 3).to(torch.uint8))


def test_measure_on_known_answers():
    """Perfect pixels: error 0, PSNR inf; 100 images in 2 of 4 codes: usage 1/2, perplexity 2."""
    levels = torch.tensor([0, 3], dtype=torch.uint8).repeat(50)
    images = levels.view(100, 1, 1, 1).expand(-1, 2, 2, 3)
    report = measure(images, Grey)
    assert (report.error, report.psnr, report.usage) == (0, math.inf, 0.5)
    assert report.perplexity == pytest.approx(2)
    images = images.clone()
    images[..., 2] += 3  # blue is off by 3 everywhere: error 1, MSE 3
    assert measure(images, Grey).error == pytest.approx(1)
    assert measure(images, Grey).psnr == pytest.approx(10 * math.log10(255**2 / 3))


def test_measure_holds_one_piece_at_a_time():
    """Of 1000 reconstructed images, no more than two batches of 64 exist at once."""
    alive, most = weakref.WeakSet(), []

    class Watched(Grey):
        def decode(codes):
            alive.add(images := Grey.decode(codes))
            most.append(len(alive))
            return images

    assert measure(torch.zeros(1000, 2, 2, 3, dtype=torch.uint8), Watched).error == 0
    assert len(most) == 16 and max(most) <= 2


# ---------------------------------------------------------------- save and load

def test_save_and_load(trained):
    """config() survives JSON; with the state dict it rebuilds a tokenizer that agrees exactly."""
    _, images, vq, _ = trained
    file = io.BytesIO()
    torch.save(vq.state_dict(), file)
    file.seek(0)
    torch.manual_seed(123)
    twin = VQ(**json.loads(json.dumps(vq.config())))
    assert not torch.equal(twin.decode(vq.encode(images)), vq.decode(vq.encode(images)))
    twin.load_state_dict(torch.load(file, weights_only=True))
    assert twin.config() == vq.config()
    assert torch.equal(twin.encode(images), vq.encode(images))
    assert torch.equal(twin.decode(vq.encode(images)), vq.decode(vq.encode(images)))


def test_training_on_continues_from_the_loaded_codes(trained):
    """The shares are saved too, so that the first step after loading restarts only dead codes."""
    quantizer, images, vq, _ = trained
    twin = VQ(**vq.config())
    twin.load_state_dict(vq.state_dict())
    if quantizer == "lfq":
        assert "codebook" not in vq.state_dict()  # it is fixed: nothing to save
        return
    latents = twin.encoder(twin.pixels(images))
    twin.restart(latents, twin.quantize(latents).codes, torch.Generator().manual_seed(0))
    moved = (twin.codebook != vq.codebook).any(1)
    assert torch.equal(moved, vq.use < module.DEAD / 32)
    assert not moved.all()


# ---------------------------------------------------------------- errors

@pytest.mark.parametrize("sizes, message", [
    (dict(quantizer="vae"), "quantizer 'vae'.*'nearest' or 'lfq'"),
    (dict(quantizer="lfq", n_codes=500), "n_codes is 500.*power of two"),
    (dict(quantizer="lfq", n_codes=1), "n_codes is 1, expected 2 or more"),
    (dict(n_codes=0), "n_codes is 0, expected 2 or more"),
    (dict(patch=3), "patch 3 is no power of two"),
    (dict(patch=0), "patch 0 is no power of two"),
])
def test_bad_sizes(sizes, message):
    """Sizes that cannot work are named, with what was expected, before anything is built."""
    with pytest.raises(ValueError, match=message):
        VQ(**sizes)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_autocast_changes_no_code(quantizer):
    """Codes and pixels under bf16 autocast, as in generate, are those of float32."""
    vq, images = build(quantizer), noise(4, 16, 16, 3)
    codes = vq.encode(images)
    pixels = vq.decode(codes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(vq.encode(images), codes)
        assert torch.equal(vq.decode(codes), pixels)


@pytest.mark.parametrize("images, message", [
    (torch.zeros(1, 8, 8, 3), r"float32 \(1, 8, 8, 3\), expected torch.uint8.*scale to 0..255"),
    (noise(8, 8, 3), r"torch.uint8 \(8, 8, 3\), expected.*\(B, H, W, 3\)"),
    (noise(1, 3, 8, 8), r"\(1, 3, 8, 8\), expected.*put the channels last"),
    (noise(0, 8, 8, 3), r"\(0, 8, 8, 3\), expected.*none of them 0"),
    (noise(1, 0, 8, 3), r"\(1, 0, 8, 3\), expected.*none of them 0"),
    (noise(1, 10, 8, 3), r"\(1, 10, 8, 3\), expected H and W divisible by patch = 4: crop, pad"),
    (noise(1, 8, 2, 3), r"\(1, 8, 2, 3\), expected H and W divisible by patch = 4"),
])
def test_bad_images(images, message):
    """encode and train_vq name dtype and shape of images that do not fit, and what to do."""
    vq = build("nearest")
    with pytest.raises(ValueError, match=message):
        vq.encode(images)
    with pytest.raises(ValueError, match=message):
        fit(images, vq, steps=1)


@pytest.mark.parametrize("codes, message", [
    (torch.zeros(1, 2, 2), r"torch.float32 \(1, 2, 2\), expected torch.int64.*use .long\(\)"),
    (torch.zeros(1, 4, dtype=torch.long), r"\(1, 4\), expected.*\(B, h, w\).*reshape each image"),
    (torch.zeros(0, 2, 2, dtype=torch.long), r"\(0, 2, 2\), expected.*none of them 0"),
    (torch.tensor([[[0, 16]]]), r"span 0..16, expected 0..15: subtract"),
    (torch.tensor([[[-1, 3]]]), r"span -1..3, expected 0..15"),
])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_bad_codes(quantizer, codes, message):
    """decode names dtype, shape or range of codes that do not fit; none wraps around silently."""
    with pytest.raises(ValueError, match=message):
        build(quantizer).decode(codes)


@pytest.mark.parametrize("run", [dict(steps=0), dict(steps=5, batch=0), dict(steps=-1)])
def test_bad_run(run):
    """Training for no steps or on no images is refused."""
    with pytest.raises(ValueError, match=r"steps -?\d, batch \d+: expected 1 or more of each"):
        fit(noise(1, 4, 4, 3), build("lfq"), **run)

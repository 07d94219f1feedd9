"""Muon: the orthogonalisation, and the update rule against torch's own."""
import torch
from hypothesis import given
from hypothesis import strategies as st

from unimod_mini.optim import Muon, orthogonal


@given(st.integers(1, 4), st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1), st.floats(1e-3, 1e3))
def test_singular_values_move_near_one(n, rows, columns, seed, scale):
    """The shorter side's singular vectors are kept, every value that is not tiny lands in [0.6,
    1.25]; each matrix of a stack comes out as it would alone, and a transposed one transposed.
    """
    x = scale * torch.randn(n, rows, columns, generator=torch.Generator().manual_seed(seed))
    y = orthogonal(x)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    inner = u.mT @ y @ v.mT  # diagonal in the basis of x
    large = s > 0.05 * s[:, :1] * (s.shape[1] ** 0.5)
    moved = inner.diagonal(dim1=1, dim2=2)
    assert ((moved > 0.6) & (moved < 1.25))[large].all()
    assert (inner - torch.diag_embed(moved)).abs().max() < 1e-2
    torch.testing.assert_close(y[:1], orthogonal(x[:1]), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(orthogonal(x.mT), y.mT, rtol=1e-3, atol=1e-3)


def test_a_gradient_of_zero_moves_nothing():
    """No division by zero: only the decay acts."""
    weight = torch.ones(3, 4, requires_grad=True)
    weight.grad = torch.zeros(3, 4)
    Muon([weight], lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(weight.detach(), torch.full((3, 4), 0.95))


def test_it_follows_torch_optim_muon():
    """Three steps over matrices of two shapes, one without a gradient at first: torch.optim.Muon's
    weights, up to the bf16 in which torch multiplies.
    """
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(*shape, generator=generator) for shape in ((24, 16), (16, 40), (24, 16))]
    ours, theirs = ([x.clone().requires_grad_() for x in start] for _ in range(2))
    pair = Muon(ours, lr=0.02), torch.optim.Muon(theirs, lr=0.02, weight_decay=0.01)
    for step in range(3):
        for i, (a, b) in enumerate(zip(ours, theirs)):
            a.grad = None if step == 0 and i == 2 else torch.randn(a.shape, generator=generator)
            b.grad = a.grad
        for optimizer in pair:
            optimizer.step()
    for a, b, x in zip(ours, theirs, start):
        assert (a - b).norm() < 0.03 * (a - x).norm()

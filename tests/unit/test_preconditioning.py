"""Scaled gradients of LoRA: those of the definition, and a step that does not depend on how the product is split."""

import torch
from torch import nn

from nuteprune.training.preconditioning import DAMPING, Preconditioner


def pairs(seed: int = 0) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Factors of two shapes with gradients, B away from 0."""
    torch.manual_seed(seed)
    made = []
    for n, k in ((6, 5), (7, 4), (6, 5)):
        pair = nn.Parameter(torch.randn(2, k)), nn.Parameter(torch.randn(n, 2))
        for factor in pair:
            factor.grad = torch.randn_like(factor)
        made.append(pair)
    return made


def test_each_gradient_is_scaled_by_the_other_factor():
    scaled, plain = pairs(), pairs()
    Preconditioner(scaled)()
    eye = DAMPING * torch.eye(2)
    for (a, b), (old_a, old_b) in zip(scaled, plain, strict=True):
        torch.testing.assert_close(a.grad, torch.linalg.inv(b.T @ b + eye) @ old_a.grad)
        torch.testing.assert_close(b.grad, old_b.grad @ torch.linalg.inv(a @ a.T + eye))


def test_the_step_of_the_product_does_not_depend_on_its_split():
    """BA = (BM)(M⁻¹A): plain gradient steps of the two differ by a factor of ten here, scaled ones do not."""
    torch.manual_seed(1)
    gradient, mix = torch.randn(6, 5), torch.tensor([[3.0, 1.0], [0.0, 0.2]])
    a, b = torch.randn(2, 5), torch.randn(6, 2)
    steps = {}
    for scale in (True, False):
        for name, (first, second) in {"own": (a, b), "mixed": (torch.linalg.inv(mix) @ a, b @ mix)}.items():
            pair = nn.Parameter(first), nn.Parameter(second)
            pair[0].grad, pair[1].grad = second.T @ gradient, gradient @ first.T  # of W + BA
            if scale:
                Preconditioner([pair])()
            steps[name, scale] = second @ pair[0].grad + pair[1].grad @ first
    torch.testing.assert_close(steps["own", True], steps["mixed", True], rtol=1e-2, atol=1e-3)
    assert (steps["own", False] - steps["mixed", False]).norm() > 3 * steps["own", False].norm()


def test_gradients_stay_in_their_buffer():
    pair = pairs()[0]
    before = [factor.grad.data_ptr() for factor in pair]
    Preconditioner([pair])()
    assert [factor.grad.data_ptr() for factor in pair] == before

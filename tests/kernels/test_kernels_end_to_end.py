"""The paired forward computes the same with either backend; the prune stage: tests/dist/test_kernels_ranks.py."""

import pytest
from kernels_cases import DEVICE
from pair import IDS, Pair

from nuteprune.config import LossConfig


# Norms over heads and over the whole width, weights with an offset, other activations, rotary positions of a part.
@pytest.mark.parametrize("name", ["gemma3", "mixtral", "qwen3", "olmo2", "phi3-partial", "granite"])
def test_a_family_has_the_same_losses_and_gradients_with_triton(name, monkeypatch):
    pytest.importorskip("triton", reason="triton has no build for this platform")
    pair, ids, found = Pair(name, device=DEVICE, num_hidden_layers=2), IDS[:1].to(DEVICE), {}
    for backend in ("torch", "triton"):
        monkeypatch.setenv("NUTEPRUNE_KERNELS", backend)
        losses = pair.model(ids, pair.student, pair.teacher, LossConfig())
        found[backend] = (losses, pair.gradients(losses.total))
    (losses, gradients), (ours, own) = found["torch"], found["triton"]
    assert ours.total.item() == pytest.approx(losses.total.item(), rel=1e-4)
    assert ours.terms.keys() == losses.terms.keys()
    for name, value in ours.terms.items():
        assert value.item() == pytest.approx(losses.terms[name].item(), rel=1e-4)
    assert any(not value.equal(want) for value, want in zip(own, gradients, strict=True)), "the same backend ran twice"
    for value, want in zip(own, gradients, strict=True):
        assert (value - want).abs().max() <= 1e-3 * want.abs().max() + 1e-7

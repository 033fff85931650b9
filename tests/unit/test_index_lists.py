"""Which units a view keeps: lists found from one copy of the gates, and in multiples that a GPU loads at once."""

from functools import partial

import pytest
import torch
from tiny import tiny_config, tiny_model

from nuteprune.arch import read_spec
from nuteprune.config import LoraConfig, LossConfig
from nuteprune.masks import Gates, Kept
from nuteprune.model import layers
from nuteprune.model.index_lists import LayerLists, index_lists
from nuteprune.model.layers import build_view
from nuteprune.model.pairing import PairedModel

CPU = torch.device("cpu")
SPEC = read_spec(tiny_config("llama"))  # 3 layers, 6 heads of 6 in 2 groups, 40 FFN units, 24 hidden dimensions


def gates(share: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (SPEC.layers, SPEC.heads), (SPEC.layers, SPEC.ffn), (SPEC.hidden,)
    return tuple((torch.rand(shape, generator=generator) < share).float() * 0.7 for shape in shapes)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.0])
def test_lists_are_those_of_each_layer_alone(share):
    heads, ffn, hidden = gates(share)
    found, stream = index_lists(Kept.of(SPEC, Gates(heads=heads, ffn=ffn, hidden=hidden)), CPU)
    assert_kept(stream, hidden)
    for index, layer in enumerate(found):
        assert_kept(layer.ffn[0], ffn[index])
        kept = heads[index].nonzero().flatten()
        rows = None if len(kept) == SPEC.heads else (kept[:, None] * 6 + torch.arange(6)).flatten()
        assert (layer.queries is None) == (rows is None)
        if rows is not None:
            assert torch.equal(layer.queries, rows)
            groups = (kept // SPEC.group_size).unique()
            assert torch.equal(layer.values, (groups[:, None] * 6 + torch.arange(6)).flatten())
            if layer.kv_index is not None:
                assert torch.equal(groups[layer.kv_index], kept // SPEC.group_size)
            else:
                assert layer.group_size * len(groups) == len(kept)
        assert layer.removed == (not heads[index].any() and not ffn[index].any())


def assert_kept(found: torch.Tensor | None, gate: torch.Tensor) -> None:
    kept = gate.nonzero().flatten()
    assert (found is None) == (len(kept) == len(gate))
    assert found is None or torch.equal(found, kept)


def test_ffn_units_are_kept_in_multiples_with_removed_ones():
    _, ffn, _ = gates(0.5)
    ffn[2] = 0
    found, _ = index_lists(Kept.of(SPEC, Gates(ffn=ffn)), CPU, multiple=8)
    for index, layer in enumerate(found):
        kept = ffn[index].nonzero().flatten()
        (units,) = layer.ffn
        assert len(units) % 8 == 0
        assert 0 <= len(units) - len(kept) < 8
        assert torch.isin(kept, units).all()
        assert torch.equal(units, units.unique())
    assert len(found[2].ffn[0]) == 0
    ffn[0] = 1
    ffn[0, :3] = 0  # 37 of 40: all of them
    assert index_lists(Kept.of(SPEC, Gates(ffn=ffn)), CPU, multiple=8)[0][0].ffn == [None]


def test_without_gates_nothing_is_listed():
    found, stream = index_lists(Kept.of(SPEC), CPU)
    assert stream is None
    assert found == [LayerLists(None, None, [None], SPEC.group_size, None, removed=False, routes=None)] * SPEC.layers


def test_filled_up_lists_change_neither_losses_nor_gradients(monkeypatch):
    """On the torch path; that the kernels take units whose gate is zero is in test_kernels_autograd.py."""
    results = []
    for multiple in (1, 8):
        monkeypatch.setattr(layers, "index_lists", partial(index_lists, multiple=multiple))
        hf = tiny_model("llama")
        model = PairedModel(hf, read_spec(hf.config), LoraConfig(rank=4))
        _, ffn, _ = gates(0.5)
        ffn.requires_grad_()
        student, teacher = model.view(Gates(ffn=ffn)), build_view(SPEC, None, {}, 1.0, torch.float32)
        assert all(len(layer.states["up_proj"].keep_out) % multiple == 0 for layer in student.layers)
        total = model(torch.arange(20).view(2, 10), student, teacher, LossConfig()).total
        leaves = [ffn, *(t for pair in model.lora().values() for t in pair)]
        results.append((total, *torch.autograd.grad(total, leaves)))
    for one, eight in zip(*results, strict=True):
        torch.testing.assert_close(eight, one, rtol=1e-4, atol=1e-6)

"""Importance of units against what removing them really does, and the start of log-alpha from it."""

import pytest
import torch
from tiny import VOCAB, tiny_model

from nuteprune.arch import read_spec
from nuteprune.config import LoraConfig, LossConfig
from nuteprune.masks import KINDS, Gates, sparsity_of, unit_shape
from nuteprune.model.layers import build_view
from nuteprune.model.pairing import PairedModel
from nuteprune.training.importance import initial_log_alpha, taylor_importance, unit_costs


def paired(name="llama", checkpointing=False):
    hf = tiny_model(name)
    return PairedModel(hf, read_spec(hf.config), LoraConfig(), checkpointing)


@pytest.mark.parametrize(("name", "checkpointing"), [("llama-bias", False), ("gemma3", True), ("qwen3_moe", False)])
def test_importance_is_the_squared_gradient_of_each_sequence(name, checkpointing):
    model, ids = (
        paired(name, checkpointing),
        torch.randint(0, VOCAB, (5, 12), generator=torch.Generator().manual_seed(0)),
    )
    every = [kind for kind in KINDS if kind != "experts" or model.spec.experts > 1]
    for kinds in (every, ["attn_sublayers", "ffn"]):
        found = taylor_importance(model, kinds, [ids[:4], ids[4:]], 3)
        assert list(found) == kinds
        expected = {kind: torch.zeros(unit_shape(model.spec, kind)) for kind in kinds}
        for sequence in ids.split(1):
            gates = Gates(**{kind: torch.ones_like(value).requires_grad_() for kind, value in expected.items()})
            view = build_view(model.spec, gates, {}, 1.0, torch.float32)
            model(sequence, view, None, LossConfig()).total.backward()
            for kind, gate in gates.as_dict().items():
                expected[kind] += gate.grad.square()
        for kind in kinds:
            torch.testing.assert_close(found[kind], expected[kind])
    assert not any(module._forward_pre_hooks for layer in model.layers for module in layer.layer.modules())


def test_a_unit_that_does_nothing_is_last_and_leaves_first():
    model = paired()
    with torch.no_grad():
        model.layers[1].layer.mlp.down_proj.weight[:, 7] = 0
    importance = taylor_importance(model, ["ffn"], [torch.randint(0, VOCAB, (2, 12))])
    start = initial_log_alpha(model.spec, importance, 2.0)["ffn"]
    assert importance["ffn"][1, 7] == 0
    assert start.argmin() == start.shape[1] + 7
    assert abs(float(start.mean())) < 1e-4
    assert abs(float(start.std()) - 2.0) < 0.1


def test_unit_costs_are_what_leaves_with_a_unit():
    for name in ("llama", "llama-mha-tied", "qwen2"):
        spec = paired(name).spec
        for kind, cost in unit_costs(spec).items():
            if kind == "heads" and spec.group_size > 1:
                continue  # its group stays
            gates = torch.ones(unit_shape(spec, kind))
            gates.view(-1)[0] = 0
            removed = sparsity_of(spec, Gates(**{kind: gates})) * spec.prunable
            assert abs(removed - cost) < 0.5 if kind != "hidden" else abs(removed / cost - 1) < 0.05, (name, kind)

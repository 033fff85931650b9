"""Importance of units against what removing them really does, and the start of log-alpha from it."""

import torch
from tiny import VOCAB, tiny_model

from nuteprune.arch import read_spec
from nuteprune.config import LoraConfig, LossConfig
from nuteprune.masks import Gates, sparsity_of, unit_shape
from nuteprune.model.layers import build_view
from nuteprune.model.pairing import PairedModel
from nuteprune.training.importance import initial_log_alpha, taylor_importance, unit_costs


def paired(name="llama"):
    hf = tiny_model(name)
    return PairedModel(hf, read_spec(hf.config), LoraConfig())


def test_importance_is_the_squared_gradient_of_each_sequence():
    model, ids = paired(), torch.randint(0, VOCAB, (3, 12), generator=torch.Generator().manual_seed(0))
    found = taylor_importance(model, ["ffn", "heads"], [ids[:2], ids[2:]])
    expected = torch.zeros(unit_shape(model.spec, "ffn"))
    for sequence in ids.split(1):
        gate = torch.ones_like(expected).requires_grad_()
        view = build_view(model.spec, Gates(ffn=gate), {}, 1.0, torch.float32)
        loss = model(sequence, view, None, LossConfig()).total
        expected += torch.autograd.grad(loss, gate)[0].square()
    torch.testing.assert_close(found["ffn"], expected)
    assert set(found) == {"ffn", "heads"}


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

"""The optimizer side: the loss scale of float16, and gradients that lie in one buffer."""

import torch
from tiny import tiny_model

from nuteprune.arch import read_spec
from nuteprune.config import load_config
from nuteprune.masks import MaskSet
from nuteprune.model.pairing import PairedModel
from nuteprune.parallel.distributed import World
from nuteprune.training.engine import Engine, LossScale


def engine(dtype=torch.float32) -> Engine:
    hf = tiny_model("llama").to(dtype)
    config = load_config(None, ["gates.ffn_multiple=1"])
    spec = read_spec(hf.config)
    return Engine(PairedModel(hf, spec, config.lora), MaskSet(spec, config.gates), None, config, 10, World())


def test_the_scale_halves_at_an_overflow_and_doubles_after_200_good_steps():
    scale = LossScale(torch.float16)
    first = scale.value
    scale.update(False)
    assert scale.value == first / 2
    for _ in range(199):
        scale.update(True)
    assert scale.value == first / 2
    scale.update(True)
    assert scale.value == first
    plain = LossScale(torch.bfloat16)
    plain.update(False)
    assert plain.value == 1


def test_the_scale_does_not_change_the_gradients():
    norms = []
    for dtype in (torch.float32, torch.float16):
        e = engine(dtype)
        for p in e.lora:
            e.backward(p.sum() * 1e-3)
        norms.append(e.step(0).grad_norm)
    assert norms[0] > 0
    assert norms[0] == norms[1]


def test_a_parameter_without_a_part_in_the_step_has_a_zero_gradient_in_the_buffer():
    e = engine()
    e.backward(e.lora[0].sum())
    assert e.lora[1].grad.abs().sum() == 0
    assert e.gradients.sum() == e.lora[0].numel()
    e.discard()
    assert e.lora[0].grad.abs().sum() == 0


def test_a_gradient_that_overflows_changes_nothing_and_halves_the_scale():
    e = engine(torch.float16)
    before, scale = e.lora[0].detach().clone(), e.scale.value
    e.backward(e.lora[0].sum() * float("inf"))
    assert e.step(0).skipped
    assert torch.equal(e.lora[0], before)
    assert e.scale.value == scale / 2

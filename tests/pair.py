"""A tiny paired model with views of a student and a teacher, for the tests of the paired forward and of its kernels."""

from dataclasses import replace

import torch
from tiny import VOCAB, tiny_model

from nuteprune.arch import read_spec
from nuteprune.config import GateConfig, LoraConfig
from nuteprune.masks import KINDS, MaskSet
from nuteprune.model.layers import build_view
from nuteprune.model.pairing import PairedModel

IDS = torch.randint(0, VOCAB, (2, 19), generator=torch.Generator().manual_seed(3))


class Pair:
    """A paired tiny model with a student and a teacher view in which some units of each kind are removed."""

    def __init__(self, name, checkpointing=False, skip=True, attention="sdpa", dtype=torch.float32, device="cpu",
                 **sizes):  # fmt: skip
        hf = tiny_model(name, **sizes).to(device, dtype)
        hf.set_attn_implementation(attention)
        self.spec = read_spec(hf.config)
        lora = LoraConfig(rank=3, targets=list(self.spec.lora_targets))
        self.model = PairedModel(hf, self.spec, lora, checkpointing)
        generator = torch.Generator().manual_seed(0)
        for factor in (factor for pair in self.model.lora().values() for factor in pair):
            factor.data.copy_(torch.empty(factor.shape).normal_(0, 0.3, generator=generator))  # the same on any device
        self.masks = MaskSet(self.spec, GateConfig(units=list(KINDS), shape="per_layer"))
        for la in self.masks.log_alpha.values():
            la.data.normal_(0, 2, generator=generator)
        self.masks = self.masks.to(device)
        self.masks.project(0.35)
        gates = self.masks.sample(torch.Generator().manual_seed(5))
        assert any(((z > 0) & (z < 1)).any() for z in gates.as_dict().values())
        assert any((z == 0).any() for z in gates.as_dict().values())
        self.student = build_view(self.spec, gates, self.model.lora(), 1.0, dtype, skip_removed=skip)
        if not skip:  # a layer that is gone has no term in the loss, however it is computed
            known = build_view(self.spec, gates, {}, 1.0, dtype).layers
            layers = [
                replace(l, kept=replace(l.kept, removed=k.kept.removed))
                for l, k in zip(self.student.layers, known, strict=True)
            ]
            self.student = replace(self.student, layers=layers)
        old = {k: (a.detach() * 0.5, b.detach() * 0.5) for k, (a, b) in self.model.lora().items()}
        self.masks.project(0.1)
        self.teacher = build_view(self.spec, self.masks.deterministic(), old, 1.0, dtype, skip_removed=skip)

    def gradients(self, loss):
        parameters = [*self.masks.parameters(), *(t for pair in self.model.lora().values() for t in pair)]
        return torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)

"""Transformers' norms, rotary positions and FFN as kernels of their own, wherever triton runs; elsewhere as they are.

Modules keep their classes, names and parameters: an instance gets another `forward`, which falls back to its own.
Rotary positions are a function of the modelling file, whose name there is bound anew.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.activations import ACT2FN

from nuteprune.arch import FFN, ArchSpec, projections
from nuteprune.kernels.api import ffn_kernels, rowwise_kernels
from nuteprune.model.projection import MaskedLoRALinear
from nuteprune.model.wrappers import GatedNorm, WidthNorm

_ACTIVATIONS = {False: type(ACT2FN["silu"]), True: type(ACT2FN["gelu_pytorch_tanh"])}
"""Classes of the activations that the FFN's kernels know, by whether it is GELU."""


def install_kernels(layers: nn.ModuleList, final_norm: nn.Module, spec: ArchSpec) -> None:
    """Let the decoder's layers, whose projections are `MaskedLoRALinear` already, and its last norm use the kernels."""
    final_norm.forward = _Norm(final_norm, spec)
    for layer in layers:
        for norm in _norms(layer, spec):
            norm.forward = _Norm(norm, spec)
        for block in getattr(layer.mlp, "experts", None) or [layer.mlp]:
            _let_ffn(block, layer)
        _let_rotary(sys.modules[type(layer.self_attn).__module__])


def _let_ffn(block: nn.Module, layer: nn.Module) -> None:
    """The FFN of a layer or of an expert, where its activation is one of those that the kernels know."""
    gelu = next((k for k, kind in _ACTIVATIONS.items() for m in block.children() if isinstance(m, kind)), None)
    if gelu is not None:
        owners = projections(layer) if block is layer.mlp else {name: (block, name) for name in FFN}
        gate, up, down = (getattr(*owners[name]) for name in FFN)
        block.forward = _Ffn(block.forward, gate, up, down, gelu)


def _norms(layer: nn.Module, spec: ArchSpec) -> list[nn.Module]:
    """A layer's RMSNorms that take all they normalise: over the hidden dimensions, or over single heads."""
    found = [getattr(layer, name) for name in spec.norms]
    found += [getattr(layer.self_attn, name) for name in ("q_norm", "k_norm") if spec.qk_norm]
    return [norm.norm if isinstance(norm, GatedNorm) else norm for norm in found if not isinstance(norm, WidthNorm)]


class _Norm:
    """The forward of an RMSNorm."""

    def __init__(self, norm: nn.Module, spec: ArchSpec):
        self.norm, self.inner = norm, norm.forward
        self.form = (spec.norm_eps, spec.norm_offset, not spec.norm_in_float)

    def __call__(self, x: Tensor) -> Tensor:
        weight = self.norm.weight
        kernels = rowwise_kernels(x, weight)
        return self.inner(x) if kernels is None else kernels.rms_norm(x, weight, *self.form)


class _Ffn:
    """The forward of a gated FFN, whose three projections are masked."""

    def __init__(
        self, inner: Callable, gate: MaskedLoRALinear, up: MaskedLoRALinear, down: MaskedLoRALinear, gelu: bool
    ):
        self.inner, self.parts, self.gelu = inner, (gate, up, down), gelu

    def __call__(self, x: Tensor) -> Tensor:
        # Whoever hooks down_proj wants to see its input, which the kernels never make a tensor of its own.
        down = self.parts[2]
        call = None if down._forward_pre_hooks or down._forward_hooks else ffn_kernels(x)
        return self.inner(x) if call is None else call(x, tuple(part.product for part in self.parts), self.gelu)


def _let_rotary(modelling: Any) -> None:
    """Bind `apply_rotary_pos_emb` of a modelling file anew, once."""
    inner = modelling.apply_rotary_pos_emb
    if hasattr(inner, "takes_kernels"):
        return

    def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1):
        whole = q.dim() == 4 and cos.dim() == 3 and cos.shape[-1] == q.shape[-1] == k.shape[-1]
        kernels = rowwise_kernels(q, k) if unsqueeze_dim == 1 and whole else None
        return inner(q, k, cos, sin, unsqueeze_dim) if kernels is None else kernels.rotary(q, k, cos, sin)

    wrapper: Any = apply_rotary_pos_emb
    wrapper.takes_kernels = True
    modelling.apply_rotary_pos_emb = wrapper

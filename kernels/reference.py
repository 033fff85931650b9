"""The specification: a masked LoRA projection in plain, differentiable torch. Slow and simple; autograd does the rest.

Letters: M tokens, K inputs, N outputs, R rank.
"""

import torch
from torch import Tensor


def _dense_gate(gate: Tensor | None, keep: Tensor | None, size: int, x: Tensor) -> Tensor:
    """The gate as a dense vector in x's dtype: 1 where there is none, 0 outside `keep`, no gradient at exact zeros."""
    if gate is None:
        gate = torch.ones(size, device=x.device, dtype=x.dtype)
    if keep is not None:
        kept = torch.zeros(size, device=x.device, dtype=torch.bool)
        kept[keep] = True
        gate = torch.where(kept, gate, torch.zeros_like(gate))
    return torch.where(gate != 0, gate, gate.detach()).to(x.dtype)


def reference_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scaling: float = 1.0,
    in_gate: Tensor | None = None,
    out_gate: Tensor | None = None,
    *,
    keep_in: Tensor | None = None,
    keep_out: Tensor | None = None,
    compact_in: bool = False,
    compact_out: bool = False,
) -> Tensor:
    """y = ((x⊙m_in)Wᵀ + s((x⊙m_in)Aᵀ)Bᵀ + b)⊙m_out; see `api.masked_lora_linear` for arguments and shapes."""
    n, k = weight.shape
    if compact_in:
        full = x.new_zeros(*x.shape[:-1], k)
        x = full.index_copy(-1, keep_in, x)
    x = x * _dense_gate(in_gate, keep_in, k, x)
    y = x @ weight.detach().t()
    if lora_a is not None:
        assert lora_b is not None
        y = y + scaling * (x @ lora_a.to(x.dtype).t()) @ lora_b.to(x.dtype).t()
    if bias is not None:
        y = y + bias.detach()
    y = y * _dense_gate(out_gate, keep_out, n, x)
    return y.index_select(-1, keep_out) if compact_out else y


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, rounds: bool = True) -> Tensor:
    """(weight + offset)⊙x / sqrt(mean(x²) + eps) in fp32 at least; `rounds`: to x's type before the product."""
    wide = torch.promote_types(x.dtype, torch.float32)
    normed = x.to(wide) * torch.rsqrt(x.to(wide).square().mean(-1, keepdim=True) + eps)
    if rounds:
        normed = normed.to(x.dtype).to(wide)
    return (normed * (weight.to(wide) + offset)).to(x.dtype)


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """x·cos + rotate_half(x)·sin of q [B, H, T, P] and k [B, K, T, P]; cos and sin [B or 1, T, P]."""
    cos, sin = cos[:, None], sin[:, None]
    halves = (x.chunk(2, dim=-1) for x in (q, k))
    return tuple(x * cos + torch.cat((-b, a), -1) * sin for x, (a, b) in zip((q, k), halves, strict=True))


def gated_ffn(x: Tensor, gate: dict, up: dict, down: dict, gelu: bool = False) -> Tensor:
    """down(act(gate(x))⊙up(x)); each part is the keyword arguments of `reference_linear` but x."""
    opened = reference_linear(x, **gate)
    opened = torch.nn.functional.gelu(opened, approximate="tanh") if gelu else torch.nn.functional.silu(opened)
    return reference_linear(opened * reference_linear(x, **up), **down)

"""The masked LoRA projection as custom ops, for torch.compile and tensors without values.

In eager mode their dispatch would be most of a small layer's time.
"""

import torch
from torch import Tensor

from nuteprune.kernels.launch import in_rows, matmul
from nuteprune.kernels.masked_lora import gradients
from nuteprune.kernels.product import Product
from nuteprune.kernels.torch_path import rows

_OPERAND = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor? lora_a, Tensor? lora_b, Tensor? in_gate, Tensor? out_gate, "
    "Tensor? keep_in, Tensor? keep_out, float scaling, bool compact_in, bool compact_out"
)


@torch.library.custom_op("nuteprune::masked_lora_forward", mutates_args=(), schema=f"({_OPERAND}) -> (Tensor, Tensor)")
def forward_op(x: Tensor, *args) -> tuple[Tensor, Tensor]:
    """(y, u) of a product of x; u is of size 0 without LoRA."""
    y, u = matmul(Product(*args), in_rows(x))
    return y, y.new_empty(x.shape[0], 0) if u is None else u


@forward_op.register_fake
def _fake_outputs(
    x, weight, bias, lora_a, lora_b, in_gate, out_gate, keep_in, keep_out, scaling, compact_in, compact_out
):
    n = keep_out.shape[0] if compact_out else weight.shape[0]
    rank = 0 if lora_a is None else lora_a.shape[0]
    return x.new_empty(x.shape[0], n), x.new_empty(x.shape[0], rank)


@torch.library.custom_op(
    "nuteprune::masked_lora_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor u, Tensor? y, {_OPERAND}, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def backward_op(grad: Tensor, u: Tensor, y: Tensor | None, x: Tensor, *args) -> tuple[Tensor, ...]:
    """`gradients`; an empty tensor for each that `needs` does not name (an op's outputs may not share memory)."""
    *operands, needs = args
    found = gradients(grad, u, y, Product(*operands), x, needs)
    return tuple(grad.new_empty(0) if d is None else d for d in found)


@backward_op.register_fake
def _(grad, u, y, x, weight, bias, lora_a, lora_b, in_gate, out_gate, keep_in, keep_out, scaling, ci, co, needs):
    leaves = (x, lora_a, lora_b, in_gate, out_gate)
    return tuple(
        leaf.new_empty(leaf.shape) if need else grad.new_empty(0) for need, leaf in zip(needs, leaves, strict=True)
    )


class TracedLoraLinear(torch.autograd.Function):
    """`MaskedLoraLinears` of one projection.

    Arguments: x in any number of dimensions, then those of `Product`.
    """

    @staticmethod
    def forward(ctx, x: Tensor, *args):
        y, u = forward_op(rows(x), *args)
        y = y.view(*x.shape[:-1], y.shape[-1])
        ctx.options = args[8:]
        ctx.save_for_backward(x, args[0], *args[2:8], u, y if ctx.needs_input_grad[6] else None)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, *operands, u, y = ctx.saved_tensors
        needs = ctx.needs_input_grad
        wanted = [needs[0], *needs[3:7]]
        y = None if y is None else rows(y)
        results = backward_op(rows(grad), u, y, rows(x), weight, None, *operands, *ctx.options, wanted)
        dx, *small = (d if need else None for d, need in zip(results, wanted, strict=True))
        return dx if dx is None else dx.view(x.shape), None, None, *small, *[None] * 5

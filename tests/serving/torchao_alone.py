"""Loads exports with weight-only int8 of torchao, as a user does: `make check-torchao EXPORT=DIR`.

Arguments: directories. What the quantised model computes is held against the same model with the weights that int8
made of it; how far those are from the export's own is printed.
"""

import sys

import torch
import torchao
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, TorchAoConfig

PROMPT, TOLERANCE = 64, 2e-5


def load(directory, **options):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, trust_remote_code=True, **options)
    return model.eval()


@torch.no_grad()
def compare(directory):
    """Matrices in int8 of all, difference of the logits from the rounded weights' and from the export's own."""
    plain, quantized = load(directory), load(directory, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))
    ids = torch.randint(3, plain.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    own, got = plain(ids).logits, quantized(ids).logits
    matrices = [name for name, module in plain.model.layers.named_modules() if isinstance(module, torch.nn.Linear)]
    for name in matrices:
        weight = quantized.model.layers.get_submodule(name).weight
        assert type(weight).__name__ == "Int8Tensor", f"{name} is a {type(weight).__name__}"
        plain.model.layers.get_submodule(name).weight.copy_(weight.dequantize())
    rounded = plain(ids).logits
    apart = float((got - rounded).abs().max() / rounded.abs().max())
    return len(matrices), apart, float((rounded - own).norm() / own.norm())


def main():
    for directory in sys.argv[1:]:
        count, apart, rounding = compare(directory)
        sys.stdout.write(f"torchao {torchao.__version__}, {directory}: {count} matrices in int8, logits within "
                         f"{apart:.1e} of the rounded weights' and {rounding:.1%} from the export's\n")  # fmt: skip
        sys.stdout.flush()
        if not (count and apart <= TOLERANCE):
            sys.exit("int8 computes something else")


if __name__ == "__main__":
    main()

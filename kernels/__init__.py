"""Masked LoRA projections: the public calls, loaded on first use.

Nothing heavy is imported here. transformers looks for the Hugging Face package of the same name and may import this
module just to read a version: an import of triton at this point would break every model load where triton is missing.
For the same reason there is no `__version__`: transformers must not take this package for that one.
"""

from importlib import import_module

__all__ = ["Half", "masked_lora_linear", "masked_lora_linear_pair"]


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("kernels.api"), name)

"""Exports tiny random models of every family in the shapes that engines know, for `make check-vllm` and its likes.

Arguments: a directory, and settings (`export.gguf=f32`). Writes DIR/FAMILY-SHAPE each, and prints their paths.
"""

import logging
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from exporting import FAMILIES, PLAIN, SHAPES, base_model, some_gates, trained

from nuteprune.errors import UserError
from nuteprune.masks import Gates
from nuteprune.stages import export

SIZES = {
    "llama": {"hidden_size": 96, "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
    "mistral": {"sliding_window": 32},
    **{family: {"hidden_size": 192} for family in ("qwen2", "olmo2", "olmo3")},
    **{family: {"hidden_size": 96} for family in ("qwen3_moe", "mixtral")},
}
HEAD_DIM = 32
"""The smallest that vLLM's attention takes."""


def gates(spec, shape):
    """Some units of every kind removed; in the per-layer shapes also sublayers, but not the first attention.

    Of a uniform OLMo only FFN units: llama.cpp wants its heads as wide as the hidden size.
    """
    # Of a uniform Qwen2 vLLM takes hidden size / heads, four here, for the head size.
    # With experts its CPU build wants a multiple of 32.
    hidden = 4 * HEAD_DIM if (spec.family, shape) == ("qwen2", "uniform") else 64 if spec.experts > 1 else 40
    chosen = some_gates(spec, shape, hidden=hidden, empty=False)
    if (spec.qk_norm, shape) == ("width", "uniform"):
        return Gates(ffn=chosen.ffn)
    if shape != "uniform":
        chosen.attn_sublayers[[1, 3]] = 0
        if spec.experts == 1:
            chosen.ffn_sublayers[[2, 3]] = 0
    return chosen


def main():
    folder, *settings = sys.argv[1:]
    logging.getLogger("transformers").setLevel(logging.ERROR)
    for family in FAMILIES:
        for shape in SHAPES:
            place = Path(folder) / f"{family}-{shape}"
            place.mkdir(parents=True)
            options = {**PLAIN.get(family, {}), **SIZES.get(family, {})}
            base = base_model(family, head_dim=HEAD_DIM, rms_norm_eps=1e-3, **options)
            asked = {"gates.shape": shape, "export.output": place / "export", **dict(s.split("=") for s in settings)}
            config, *_ = trained(place, family, lambda s, k=shape: gates(s, k), base=base, **asked)
            try:
                directory = export.run(config)
            except UserError as error:  # llama.cpp cannot hold it
                sys.stderr.write(f"{family} {shape}: {error}\n")
                directory = export.run(replace(config, export=replace(config.export, gguf="none")))
            sys.stdout.write(f"{directory}\n")


if __name__ == "__main__":
    main()

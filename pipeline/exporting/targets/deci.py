"""vLLM's own DeciLM: a `per_layer_ffn` model that it serves unmodified, by `block_configs` in config.json."""

from pathlib import Path

from transformers import PreTrainedModel

from nuteprune.exporting.targets.base import ExportPlan, Target

FAMILIES = ("llama", "mistral")
"""Whose layers DeciLM computes (those of Qwen have biases or norms that it lacks)."""


class Deci(Target):
    """Written wherever DeciLM computes these layers."""

    def check(self, plan: ExportPlan) -> bool:
        """See `Target`; never refuses."""
        return bool(_blocks(plan))

    def write(self, directory: Path, plan: ExportPlan, model: PreTrainedModel) -> None:
        """See `Target`."""
        config = type(model.config).from_pretrained(directory)
        config.block_configs = _blocks(plan)
        config.save_pretrained(directory)


def _blocks(plan: ExportPlan) -> list[dict]:
    """`block_configs` of the layers; empty where DeciLM does not compute them."""
    if plan.shape != "per_layer_ffn":
        return []
    spec, small = plan.fold.spec, plan.small
    layers = [small.layer_sizes(index) for index in range(small.num_hidden_layers)]
    kinds = {tuple(groups) for groups, _ in layers if groups}
    assert len({size for kind in kinds for size in kind}) == len(kinds) <= 1, "attention is alike in this shape"
    absent = not all(groups and width for groups, width in layers)
    first = next((groups for groups, width in layers if groups or width), None)
    if spec.family not in FAMILIES or not first or (absent and (spec.o_bias or spec.mlp_bias)):
        return []  # a first layer without attention, or a removed sublayer's bias
    return [
        {"attention": {"no_op": not groups, "n_heads_in_group": groups[0] if groups else None},
         "ffn": {"no_op": not width, "intermediate_size": width or None}}
        for groups, width in layers
    ]  # fmt: skip

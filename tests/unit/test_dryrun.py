"""Dry runs of the big models' recipes, and what they find, without any download."""

import pytest
from torch.nn.modules.module import register_module_parameter_registration_hook

from nuteprune.__main__ import main
from nuteprune.config import load_config
from nuteprune.errors import UserError
from nuteprune.parallel.sizes import total_parameters
from nuteprune.planning.dryrun import dry_run
from nuteprune.planning.models import HUB, named_spec

RECIPES = {"llama2-13b": 8, "llama3.1-8b": 8, "llama3.1-70b": 16, "mistral-7b": 8, "qwen3-14b": 8, "granite3.3-8b": 8,
           "smollm3-3b": 8, "phi4": 8, "olmo2-7b": 8, "olmo3-7b": 8, "gemma3-1b": 8, "mixtral-8x7b": 8,
           "qwen3-30b-a3b": 8}  # fmt: skip
"""Recipe and the number of ranks that it is made for."""


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_on_its_ranks(recipe):
    config = load_config(None, [f"recipe={recipe}"])
    ranks, spec = RECIPES[recipe], named_spec(HUB[config.model.path])
    found = dry_run(config, ranks, 8)
    assert found.total == 2 * total_parameters(spec)
    assert found.gates["ffn"] == (spec.layers, spec.ffn_units)
    if config.deepspeed == "zero2":
        assert (found.share, found.gathered) == (found.total, 0)
    else:
        assert found.share == pytest.approx(found.total / ranks, rel=1e-3)
        assert 0.99 * found.total < found.gathered < found.total


@pytest.mark.parametrize("recipe", ["qwen3-14b", "qwen3-30b-a3b"])
def test_work_does_not_grow_with_layers_and_experts(recipe):
    """48 layers of 128 experts have 18,432 matrices; what is built is what two layers of chosen experts have."""
    built = []
    hook = register_module_parameter_registration_hook(lambda module, name, parameter: built.append(name))
    try:
        dry_run(load_config(None, [f"recipe={recipe}"]), 8, 8)
    finally:
        hook.remove()
    assert 0 < len(built) < 300


@pytest.mark.parametrize("recipe", ["phi4", "olmo2-7b", "gemma3-1b"])
def test_unlike_layers_are_partitioned_too(recipe):
    found = dry_run(load_config(None, [f"recipe={recipe}", "deepspeed=zero3", "train.batch_size=16"]), 8, 8)
    assert found.share == pytest.approx(found.total / 8, rel=2e-3)
    assert 0.99 * found.total < found.gathered < found.total


def test_13b_on_16_ranks_with_offload(capsys):
    arguments = ["recipe=llama2-13b", "deepspeed=zero3_offload", "train.activation_checkpointing=true"]
    assert main(["prune", *arguments, "--dry-run", "--world-size", "16"]) == 0
    printed = capsys.readouterr().out
    assert "partitioned by ZeRO-3: 1.6" in printed
    assert "552,960 ffn (40 x 13824)" in printed
    assert "memory of one rank" in printed


def test_beside_a_gpu_it_runs_on_the_cpu():
    """DeepSpeed picks CUDA where there is a card; the ids and gates of a dry run are on the CPU."""
    from deepspeed.accelerator import get_accelerator, set_accelerator
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

    before = get_accelerator()
    set_accelerator(CUDA_Accelerator())
    try:
        found = dry_run(load_config(None, ["recipe=llama2-13b", "deepspeed=zero3"]), 8, 8)
    finally:
        set_accelerator(before)
    assert found.gathered


@pytest.mark.parametrize(
    ("overrides", "ranks", "complaint"),
    [
        ([], 12, "cannot be split over 12 ranks"),
        (["gates.units=[heads]", "sparsity.target=0.9"], 8, "out of reach"),
        (["deepspeed=zero3_typo"], 8, "no such file"),
    ],
)
def test_what_cannot_work_is_told(overrides, ranks, complaint):
    config = load_config(None, ["recipe=llama2-13b", *overrides])
    with pytest.raises(UserError, match=complaint):
        dry_run(config, ranks, 8)


def test_ranks_must_fill_nodes(capsys):
    assert main(["prune", "recipe=llama2-13b", "--dry-run", "--world-size", "12"]) == 2
    assert "not made of whole nodes" in capsys.readouterr().err

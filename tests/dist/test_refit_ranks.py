"""Refit on two ranks, whose weights ZeRO-3 partitions, against one process."""

import sys
from pathlib import Path

import pytest
import ranks
import torch
from safetensors.torch import load_file, save_file

from nuteprune.config import load_config
from nuteprune.masks import Gates
from nuteprune.parallel.distributed import World, connected, discover
from nuteprune.stages import prune

pytestmark = pytest.mark.xdist_group("ranks")


def refitted(config, world: World) -> tuple[prune.Pruning, dict[str, torch.Tensor]]:
    """A run before its first step whose every second FFN unit has left, and its refit's pairs."""
    trainer = prune.Pruning.build(config, world)
    gate = torch.ones(trainer.model.spec.layers, trainer.model.spec.ffn)
    gate[:, ::2] = 0
    assert trainer.refit is not None
    trainer.refit.apply(Gates(ffn=gate))
    frozen = trainer.model.update.frozen.items()
    return trainer, {f"{key}.{s}": t.contiguous() for key, pair in frozen for s, t in zip("AB", pair, strict=True)}


def on_a_rank() -> None:
    """In a rank: its pairs, and the G and weights that it keeps."""
    out, *overrides = sys.argv[1:]
    world = discover()
    with connected(world, 60):
        trainer, pairs = refitted(load_config(None, overrides), world)
        refit = trainer.refit
        held = {f"packed.{index}": packed for index, packed in refit._packed.items()}
        held |= {f"weights.{index}": weight for index, weight in refit._weights.items()}
        save_file(pairs | held, f"{out}-{world.rank}.safetensors")


def test_two_ranks_share_the_text_and_the_layers_and_find_the_same_pairs(settings, tmp_path):
    settings = [*settings, "lora.refit=8"]
    trainer, wanted = refitted(load_config(None, settings), World())
    ranks.run([str(tmp_path / "rank"), *settings, "deepspeed=zero3"], 2, tmp_path / "logs", program=on_a_rank)
    found = [load_file(Path(f"{tmp_path}/rank-{rank}.safetensors")) for rank in range(2)]
    for rank in range(2):
        kept = {name for name in found[rank] if name.startswith(("packed", "weights"))}
        assert kept == {f"{what}.{i}" for what in ("packed", "weights") for i in range(rank, 3, 2)}
        for name in kept:
            what, index = name.split(".")
            held, whole = found[rank][name], getattr(trainer.refit, f"_{what}")[int(index)]
            if what == "packed":  # G and its ridge; the inverse shows in the pairs below
                held, whole = held.tril(-1), whole.tril(-1)
            assert (held - whole).norm() <= 1e-5 * whole.norm(), name
    for index in range(3):
        products = [side[f"{index}.down_proj.B"] @ side[f"{index}.down_proj.A"] for side in (*found, wanted)]
        assert torch.equal(products[0], products[1])
        assert (products[0] - products[2]).norm() < 1e-3 * products[2].norm()

"""What ranks compare before they train."""

import os

import pytest
import torch

from nuteprune.config import ModelConfig, load_config
from nuteprune.errors import UserError
from nuteprune.kernels import tuning
from nuteprune.kernels.tuning import TileConfig
from nuteprune.model.loading import load_model, read_base
from nuteprune.parallel.distributed import World, discover
from nuteprune.stages import prune
from nuteprune.training.determinism import deterministic
from nuteprune.training.loop import check_alike


def ranks(**change) -> World:
    """Two ranks, of which the second sends something else."""

    class Pair(World):
        def gather(self, value):
            return [value, value | change]

    return Pair(size=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version of torch": "2.0"}, r"rank 1 has version of torch='2\.0', rank 0 '.+': start all ranks alike"),
        ({"train.lora_lr": 0.5}, r"rank 1 has train\.lora_lr=0\.5, rank 0 0\.0: start all ranks alike"),
    ],
)
def test_a_rank_with_other_versions_or_settings_is_named(change, message):
    with pytest.raises(UserError, match=message):
        check_alike(load_config(None, []), ranks(**change))


def test_alike_ranks_go_on():
    check_alike(load_config(None, []), ranks())


def test_deterministic_says_so_to_torch_cublas_flash_attention_and_the_tuner(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setenv("FLASH_ATTENTION_DETERMINISTIC", "0")
    choices = (TileConfig(128, 128, 64, 3, 8), TileConfig(64, 128, 64, 4, 4))
    with deterministic(True):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert os.environ["FLASH_ATTENTION_DETERMINISTIC"] == "1"
        monkeypatch.setattr(tuning, "INTERPRETING", False)
        # No card is asked and nothing is launched.
        assert tuning.choose("key", choices, torch.device("cuda"), lambda config: 1 / 0) == choices[0]
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert tuning.MEASURE
    with deterministic(False):
        assert not torch.are_deterministic_algorithms_enabled()


def test_a_run_is_trained_deterministically_where_it_is_asked_for(settings, monkeypatch):
    seen = []
    step = prune.Pruning.train_step
    monkeypatch.setattr(
        prune.Pruning,
        "train_step",
        lambda self: seen.append(torch.are_deterministic_algorithms_enabled()) or step(self),
    )
    prune.run(load_config(None, [*settings, "train.steps=3", "train.deterministic=true"]))
    assert seen == [True] * 3


def test_weights_are_loaded_onto_their_device_without_a_copy_on_the_host(model_dir):
    model = load_model(read_base(ModelConfig(path=str(model_dir))), "meta")
    assert all(p.is_meta for p in model.parameters())


def test_cudas_allocator_is_told_to_grow_its_segments(monkeypatch):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    discover()
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "backend:native")
    discover()
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "backend:native"

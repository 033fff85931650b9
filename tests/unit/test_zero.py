"""DeepSpeed's settings: filled in from the run, never given twice, and one line for every mistake."""

import json

import pytest
import torch
from tiny import tiny_config

from nuteprune.arch import read_spec
from nuteprune.config import DS_CONFIGS, load_config
from nuteprune.errors import UserError
from nuteprune.parallel.distributed import World
from nuteprune.parallel.sizes import layer_tensors
from nuteprune.parallel.zero import read_deepspeed, zero_settings

SPEC = read_spec(tiny_config("llama-bias"))
WORLD = World(rank=1, size=8, local_rank=1, local_size=4)


def settings(deepspeed, *overrides, world=WORLD):
    return zero_settings(load_config(None, [f"deepspeed={deepspeed}", "train.batch_size=16", *overrides]), SPEC, world)


@pytest.mark.parametrize("name", sorted(path.stem for path in DS_CONFIGS.glob("*.json")))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_file_is_completed_from_the_run(name, dtype):
    filled = settings(name, f"model.dtype={dtype}")
    assert (filled["train_batch_size"], filled["gradient_accumulation_steps"]) == (16, 1)
    assert (filled["bf16"]["enabled"], filled["fp16"]["enabled"]) == (dtype == "bfloat16", False)
    zero = filled["zero_optimization"]
    if zero["stage"] == 3:
        assert zero["stage3_param_persistence_threshold"] == SPEC.ffn == 40  # the largest bias
        matrices = [t for t in layer_tensors(SPEC) if t > SPEC.ffn]
        assert len(matrices) == 7
        assert zero["stage3_prefetch_bucket_size"] == sum(matrices)
        assert zero["stage3_max_live_parameters"] == 2 * sum(matrices)
    assert zero.get("zero_hpz_partition_size", 4) == 4
    assert zero.get("offload_param", {}).get("pin_memory", False) is False


def test_offloaded_weights_are_pinned_where_there_is_an_accelerator():
    world = World(1, 8, 1, 4, torch.device("cuda", 1))
    assert settings("zero3_offload", world=world)["zero_optimization"]["offload_param"]["pin_memory"] is True


def test_without_deepspeed_there_is_nothing_to_settle():
    assert settings("") is None


def test_sizes_of_the_file_win(tmp_path):
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"train_batch_size": 16, "bf16": "auto",
                                "zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": 7}}))  # fmt: skip
    assert settings(path)["zero_optimization"]["stage3_prefetch_bucket_size"] == 7
    assert "train_batch_size" not in read_deepspeed("zero3")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "has no section zero_optimization"),
        ({"zero_optimization": {}}, "stage must be 2 or 3, got None"),
        ({"zero_optimization": {"stage": 1}}, "stage must be 2 or 3, got 1"),
        ({"zero_optimization": {"stage": 3}, "train_batch_size": 4}, "train_batch_size is 4 there, but .* says 16"),
        ({"zero_optimization": {"stage": 3}, "fp16": {"enabled": True}}, "fp16 .* never in float16"),
        ({"zero_optimization": {"stage": 3}, "optimizer": {"type": "Adam"}}, "remove optimizer; .*train.lora_lr"),
        ({"zero_optimization": {"stage": 3}, "gradient_clipping": 1}, "remove gradient_clipping; the run clips"),
        ({"zero_optimization": {"stage": 3, "stage3_max_liv": 1}}, "zero_optimization.stage3_max_liv: Extra inputs"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "remove zero_optimization.off"),
        ({"wall_clock_breakdown": True, "zero_optimization": {"stage": 2, "contiguous_gradients": True}},
         "remove wall_clock_breakdown, zero_optimization.contiguous_gradients: stage 2 is torch's"),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 3}}, "3 does not divide the 8 ranks"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "disk"}}}, "offload_param.device: Input"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "nvme is not supported: use cpu"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}, "remove offload_optimizer"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_work_is_one_line(tmp_path, content, message):
    path = tmp_path / "own.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as error:
        settings(path)
    assert "\n" not in str(error.value)


def test_a_stage_2_file_may_leave_the_choice_to_the_run(tmp_path):
    path = tmp_path / "own.json"
    zero = {"stage": 2, "overlap_comm": "auto"}
    path.write_text(json.dumps({"train_micro_batch_size_per_gpu": "auto", "bf16": "auto", "zero_optimization": zero}))
    assert settings(path)["bf16"] == {"enabled": False}


def test_no_such_file_names_those_there_are(tmp_path):
    known = "zero2, zero3, zero3_hpz, zero3_offload"
    with pytest.raises(UserError, match=f"'zero4': no such file; use one of {known}"):
        settings("zero4")
    path = tmp_path / "own.json"
    path.write_text("{")
    with pytest.raises(UserError, match="not readable as JSON"):
        settings(path)

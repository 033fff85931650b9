"""Which device a process takes: a GPU that torch does not see is no reason to compute on the CPU, nor to open one."""

import os
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.gpu_parts import PARTS
from benchmarks.gpu_place import Place
from nuteprune.__main__ import main
from nuteprune.config import load_config
from nuteprune.errors import UserError
from nuteprune.parallel import device, host
from nuteprune.parallel.distributed import discover
from nuteprune.planning import machine
from nuteprune.stages import prune

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a GPU here")


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """The tool of NVIDIA's driver, as it answers on a machine whose driver is too old for torch."""
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 550.54.15'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_a_gpu_that_torch_does_not_see_ends_the_run_in_one_line(driver, settings, monkeypatch, capfd):
    assert main(["prune", *settings]) == 2
    told = capfd.readouterr().err.strip().splitlines()
    assert len(told) == 1
    assert "a GPU (NVIDIA H100 80GB HBM3, driver 550.54.15), but torch" in told[0]
    assert "CUDA_VISIBLE_DEVICES= (empty)" in told[0]
    assert discover(computes=False).device.type == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert discover().device.type == "cpu"


@pytest.mark.parametrize(
    ("facts", "told"),
    [({"flags": "fma avx2"}, True), ({"flags": "avx2 avx512_bf16"}, False), ({"Features": "bf16"}, False)],
    ids=["without", "with", "arm"],
)
def test_bfloat16_on_a_processor_that_does_not_multiply_it_is_warned_of(facts, told, settings, monkeypatch, caplog):
    monkeypatch.setattr(host, "processor", lambda: facts)
    prune.run(load_config(None, [*settings, "model.dtype=bfloat16", "train.steps=2"]))
    assert ("set model.dtype=float32" in caplog.text) == told
    assert machine.this_machine().bf16 == ("avx512_bf16" in facts.get("flags", ""))


def test_gpus_of_a_slurm_job(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "0")
    discover()
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    with pytest.raises(UserError, match=r"SLURM_GPUS_ON_NODE=8"):
        discover()


@pytest.mark.parametrize(
    ("size", "found"), [(64 << 30, "an AMD card, /dev/kfd"), (512 << 20, "")], ids=["card", "laptop"]
)
def test_an_amd_card_is_told_from_the_graphics_of_a_processor(size, found, tmp_path, monkeypatch):
    bank = tmp_path / "nodes" / "1" / "mem_banks" / "0" / "properties"
    bank.parent.mkdir(parents=True)
    bank.write_text(f"heap_type 1\nsize_in_bytes {size}\nflags 0\n")
    (tmp_path / "kfd").touch()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(device, "KFD", tmp_path / "kfd")
    monkeypatch.setattr(device, "TOPOLOGY", tmp_path / "nodes")
    assert device.unseen_gpu() == found


def test_plan_and_export_open_no_device(run_dir, monkeypatch, capfd):
    def opened(*_):
        raise AssertionError("a device was opened")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name in ("set_device", "_lazy_init"):
        monkeypatch.setattr(torch.cuda, name, opened)
    assert main(["plan", "llama-7b", "train.steps=10"]) == 0
    assert main(["export", str(run_dir)]) == 0


def test_native_windows_is_one_line():
    code = "import sys; sys.platform = 'win32'; from nuteprune.__main__ import cli"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "nuteprune runs on Linux and macOS. On Windows it runs inside WSL: wsl --install\n"


def test_gpu_check_misses_a_gpu_that_torch_does_not_see_and_keeps_the_result(driver, tmp_path, monkeypatch, capsys):
    out = ["--out", str(tmp_path / "check")]
    assert gpu_check.main([*out, "--parts", "device"]) == 1
    assert "| NVIDIA H100 80GB HBM3, driver 550.54.15 | **missed** |" in capsys.readouterr().out
    monkeypatch.setattr(gpu_check, "PARTS", {"device": PARTS["device"]})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu_check.main(out) == 1  # not checked again
    assert gpu_check.main([*out, "--parts", "device"]) == 0


def test_a_part_of_gpu_check_ends_with_its_budget(tmp_path):
    assert sum(budget for name, (budget, _) in PARTS.items() if name not in ("flash-attention", "two-ranks")) < 540
    began = time.monotonic()
    place = Place(tmp_path, "", "", until=began + 1)
    assert place.run("long", sys.executable, "-c", "import time; time.sleep(60)").startswith("not done when")
    assert time.monotonic() - began < 30

"""What surrounds the kernels: tuning, 32-bit offsets."""

import json
import math
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy
import pytest
import torch
from kernels_cases import DEVICE

from nuteprune.kernels.tuning import TileConfig, Tuner, bucket, milliseconds, options

pytest.importorskip("triton", reason="triton has no build for this platform")


def test_tuner_measures_once_and_remembers_on_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("NUTEPRUNE_CACHE", str(tmp_path))
    choices = options(torch.bfloat16, False, 90)
    measured = []

    def measure(config: TileConfig) -> float:
        measured.append(config)
        return -config.bn

    first = Tuner("A Card/80GB")
    widest = max(choices, key=lambda config: config.bn)
    assert first.pick("key", choices, measure) == widest
    assert measured == list(choices)
    assert [path.name for path in tmp_path.glob("*.json")] == ["kernels-A-Card-80GB.json"]
    second = Tuner("A Card/80GB")
    assert second.pick("key", choices, measure) == widest
    assert len(measured) == len(choices)


def test_tuner_survives_a_stale_or_broken_file(tmp_path, monkeypatch):
    monkeypatch.setenv("NUTEPRUNE_CACHE", str(tmp_path))
    choices = options(torch.bfloat16, False, 80)
    path = Tuner("card").path
    path.write_text(json.dumps({"key": [1, 1, 1, 1, 1]}))
    assert Tuner("card").pick("key", choices, lambda config: config.bm) == choices[1]
    path.write_text("{")
    assert Tuner("card").pick("key", choices, lambda config: config.bm) == choices[1]
    path.write_text("[]")
    assert Tuner("card").chosen == {}


def test_a_config_that_the_card_has_no_room_for_is_not_chosen(tmp_path, monkeypatch):
    from triton.runtime.errors import OutOfResources

    def launch(config: TileConfig) -> None:
        raise OutOfResources(79872, 65536, "shared memory")

    monkeypatch.setenv("NUTEPRUNE_CACHE", str(tmp_path))
    choices = options(torch.bfloat16, False, 0)
    assert milliseconds(launch, choices[0]) == math.inf
    tuner = Tuner("card")
    assert tuner.pick("key", choices, lambda config: math.inf if config == choices[0] else 1.0) == choices[1]
    assert tuner.pick("other", choices, partial(milliseconds, launch)) == choices[0]  # its launch says what is missing
    assert tuner.chosen == {"key": choices[1]}


def test_ranks_that_tune_at_once_keep_each_others_choices(tmp_path, monkeypatch):
    monkeypatch.setenv("NUTEPRUNE_CACHE", str(tmp_path))
    choices = options(torch.bfloat16, False, 80)

    def rank(number: int) -> None:
        tuner = Tuner("card")  # of its own, as in a process of its own
        for turn in range(10):
            tuner.pick(f"rank {number} shape {turn}", choices, lambda config: config.bm)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(rank, range(8)))
    assert len(Tuner("card").chosen) == 80


def test_rows_beyond_32_bit_offsets_are_reduced():
    """74,899 tokens of a layer with 28,672 units are more than 2³¹ elements; here few rows lie far apart."""
    from nuteprune.kernels.launch import column_reduce
    from nuteprune.kernels.product import Side

    if DEVICE != "cpu":
        pytest.skip("no card has so much memory to spare: the interpreter's test")
    rows, columns, stride = 160, 4, 2**31 // 128
    memory = torch.from_numpy(numpy.zeros(159 * stride + columns, dtype=numpy.float16))  # unwritten pages take none
    p = memory.as_strided((rows, columns), (stride, 1))
    p.copy_(torch.arange(rows * columns).view(rows, columns) % 7)
    q = torch.ones(rows, 2, dtype=torch.float16)
    side = Side(torch.ones(columns), None, torch.zeros(columns, 2))
    outer, dots = column_reduce(p, q, p, False, side, 1.0, across=False)
    assert torch.equal(outer, p.float().t() @ q.float())
    assert torch.equal(dots, p.float().square().sum(0))


@pytest.mark.parametrize(("tokens", "want"), [(0, 16), (1, 16), (17, 32), (2048, 2048), (2049, 4096)])
def test_bucket(tokens, want):
    assert bucket(tokens) == want


def test_bench_runs_without_a_gpu(tmp_path, monkeypatch, capsys):
    from benchmarks import kernels as bench

    if torch.cuda.is_available():
        pytest.skip("on a GPU the bench runs at full size: run it by hand")
    monkeypatch.setattr(bench, "REDUCED", {"tiny": [("down", 64, 32, "in")]})
    monkeypatch.setattr("sys.argv", ["bench", "--quick", "--json", str(tmp_path / "bench.json")])
    bench.main()
    assert "| tiny | down | 256 | 8 | 50% |" in capsys.readouterr().out
    record = json.loads((tmp_path / "bench.json").read_text())
    assert record["machine"]["card"] == "not measured"
    assert [row["sparsity"] for row in record["rows"]] == [0.0, 0.25, 0.5]
    assert all(row["ours"]["forward_ms"] > 0 for row in record["rows"])

"""The table of `make bench-engines`: ratios of one round, their median, and the share of the ceiling."""

from argparse import Namespace

import gguf
import pytest

from benchmarks.engines import file_type, table


def rows(model, *seconds):
    return [
        {"model": model, "batch": 1, "round": turn, "prefill": s, "decode": 2 * s} for turn, s in enumerate(seconds)
    ]


def test_a_ratio_is_the_median_of_the_rounds_own():
    args = Namespace(intact="base", exports=["small"], batches=[1], prompt=100, new=10)
    measured = {"engine": rows("base", 1.0, 4.0, 2.0) + rows("small", 0.5, 2.5, 1.0)[::-1]}  # a machine that drifts
    line = table(measured, args, {"small": {"speedup": 1.6}}).splitlines()[-1]
    assert line == "| engine | small | 1 | 50, 2 | 2.00 x | 2.00 x | 1.60 x | 125%, 125% |"


def gguf_file(directory, kind):
    directory.mkdir()
    writer = gguf.GGUFWriter(directory / "model.gguf", "llama")
    writer.add_file_type(kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return str(directory)


def test_files_of_several_types_are_not_compared(tmp_path):
    half, full = (gguf_file(tmp_path / name, kind) for name, kind in (
        ("half", gguf.LlamaFileType.MOSTLY_F16), ("full", gguf.LlamaFileType.ALL_F32)))  # fmt: skip
    assert file_type([half]) == "f16"
    with pytest.raises(SystemExit, match=r"of several types .f16, f32.: export with the same --gguf"):
        file_type([half, full])
    with pytest.raises(SystemExit, match="is missing: export with --gguf f16"):
        file_type([str(tmp_path)])

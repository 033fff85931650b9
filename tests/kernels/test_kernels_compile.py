"""Every kernel configuration that can be chosen compiles for A100 and H100, without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton has no build for this platform")

HERE = Path(__file__).resolve().parent
SHARED_MEMORY = {
    80: 163 * 1024,
    90: 227 * 1024,
}  # bytes a program can use, CUDA programming guide, "compute capabilities"


@pytest.mark.parametrize(
    ("dtype", "variants"),
    [
        ("bfloat16", ["bare", "both"]),
        ("bfloat16", ["gates", "rows", "compact"]),
        ("float16", ["gates"]),
        ("float32", ["rows", "both"]),
        ("float32", ["bare", "compact"]),
    ],
)
def test_tensor_cores_no_spills_fits_in_shared_memory(dtype, variants):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE.parents[1]), env.get("PYTHONPATH")]))
    command = [sys.executable, str(HERE / "compile_for_cards.py"), dtype, *variants]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    built = [json.loads(line) for line in done.stdout.splitlines()]
    assert {line["capability"] for line in built} == {80, 90}
    for line in built:
        assert line["tensor_cores"], line
        assert line["STACK"] == line["LOCAL"] == 0, f"registers spill: {line}"
        assert line["shared"] <= SHARED_MEMORY[line["capability"]], line
        is_matmul = line["label"].split()[0] in ("y", "dx")
        assert line["wgmma"] or not is_matmul or line["capability"] != 90, line

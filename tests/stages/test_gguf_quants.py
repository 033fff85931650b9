"""K-quants of model.gguf: made by llama.cpp, blocks of 256 where rows allow them, and one line where it is missing."""

import logging
import sys
from pathlib import Path

import gguf
import pytest
import torch
from exporting import base_model, loaded, some_gates, some_ids, trained
from test_gguf import refused

from nuteprune.runs.checkpoint import verify
from nuteprune.stages import export

SIZES = {"hidden_size": 288, "head_dim": 32, "intermediate_size": 512, "rms_norm_eps": 1e-3}


def test_rows_of_whole_blocks_become_k_quants_and_others_what_llama_cpp_chooses(tmp_path, caplog):
    pytest.importorskip("llama_cpp_py_sync", reason="pip install llama-cpp-py-sync")
    sys.path.insert(0, str(Path(__file__).parents[1] / "serving"))
    from llamacpp_alone import LlamaCpp

    config, *_ = trained(
        tmp_path, "llama", lambda s: some_gates(s, "per_layer_ffn", hidden=256), base=base_model("llama", **SIZES),
        **{"gates.shape": "per_layer_ffn", "export.gguf": "q4_k_m"},
    )  # fmt: skip
    with caplog.at_level(logging.INFO):
        directory = export.run(config)
    file = directory / "model.gguf"
    assert not list(directory.glob("*whole*"))
    assert (directory / "Modelfile").read_text() == "FROM ./model.gguf\n"
    verify(directory)
    matrices = {t.name: t for t in gguf.GGUFReader(file).tensors if len(t.shape) > 1}
    others = {name for name, t in matrices.items() if t.shape[0] % 256}
    assert "blk.1.ffn_down.weight" in others
    assert all((t.tensor_type.name in ("Q4_K", "Q6_K")) == (name not in others) for name, t in matrices.items())
    (line,) = (r.getMessage() for r in caplog.records if "rows that are no multiple of 256" in r.getMessage())
    assert f"of {len(matrices)} matrices {len(others)} have rows" in line
    assert "q5_0" in line or "q8_0" in line
    model = loaded(directory)
    for name, key in (("ffn_up", "up_proj"), ("ffn_down", "down_proj")):
        tensor, wanted = matrices[f"blk.1.{name}.weight"], model.state_dict()[f"model.layers.1.mlp.{key}.weight"]
        got = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type))[: wanted.shape[0], : wanted.shape[1]]
        assert (got - wanted).norm() < 0.1 * wanted.norm()  # four to six bits
    ids = some_ids(1)[0].tolist()
    with torch.no_grad():
        wanted = model(torch.tensor([ids])).logits[0]
    got = LlamaCpp(str(file), len(ids)).logits(ids)
    assert torch.cosine_similarity(got.flatten(), wanted.flatten(), dim=0) > 0.9


def test_without_llama_cpp_k_quants_are_refused_in_one_line(tmp_path, capsys, monkeypatch):
    trained(tmp_path, "llama", lambda s: some_gates(s, "uniform"))
    monkeypatch.setitem(sys.modules, "llama_cpp_py_sync", None)  # as where it is not installed
    monkeypatch.delitem(sys.modules, "llama_cpp_py_sync._cffi_bindings", raising=False)
    line = refused(capsys, f"run_dir={tmp_path / 'run'}", "--gguf", "q4_k_m")
    assert "pip install llama-cpp-py-sync" in line
    assert not (tmp_path / "run" / "export").exists()

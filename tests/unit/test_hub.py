"""The hub: one quick line where it does not answer, and what is fetched from one that does."""

import shutil
import socket
import time
from contextlib import contextmanager

import pytest
from hub import small_hub
from huggingface_hub import constants
from transformers.utils import hub as transformers_hub

from nuteprune.config import ModelConfig
from nuteprune.data.text import load_text
from nuteprune.errors import UserError
from nuteprune.evaluation import models
from nuteprune.model import hub, loading


@pytest.fixture
def endpoint(monkeypatch, tmp_path):
    """A function that makes an address the hub's, with an empty cache."""

    def use(address: str) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(transformers_hub, "_hf_api", None, raising=False)  # a client that keeps the address
        files = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub, "_last", None)

    yield use
    hub._go(offline=True)  # as the tests are


@contextmanager
def a_port(answers: bool):
    """An address at which connections are refused, or accepted and never answered."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        if answers:
            bound.listen()
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"


@pytest.mark.parametrize("silent", [False, True], ids=["refused", "silent"])
def test_a_hub_out_of_reach_is_one_line_within_ten_seconds(endpoint, silent, monkeypatch, caplog, capfd):
    monkeypatch.setattr(hub, "PATIENCE", 1.0)
    with a_port(silent) as address:
        endpoint(address)
        began = time.monotonic()
        with pytest.raises(UserError, match=rf"model.path me/x: neither .* \({address} cannot be reached: .+\)$"):
            loading.read_config("me/x")
        with pytest.raises(UserError, match=rf"allenai/c4 from the hub \({address} cannot be reached: .+ local path"):
            load_text("c4", 3, "text")
        assert time.monotonic() - began < 10
    assert not caplog.records
    assert capfd.readouterr().err == ""


def test_a_model_of_the_hub_has_its_size_before_it_is_placed(endpoint, model_dir, tmp_path):
    folder = shutil.copytree(model_dir, tmp_path / "model")
    (folder / "consolidated.safetensors").write_bytes(b"the same weights again")
    with small_hub(folder) as server:
        endpoint(server.address)
        size = models.weight_bytes(server.name, ModelConfig())
        assert size == (model_dir / "model.safetensors").stat().st_size
        models.load_any(server.name, ModelConfig())
        assert server.sent.count("model.safetensors") == 1
        assert "consolidated.safetensors" not in server.sent

"""An adapter of a model with fused projections: `peft` opens it and computes the same; it is read back unchanged."""

import pytest
import torch
from exporting import base_model, random_lora
from peft import PeftModel

from nuteprune.arch import read_spec
from nuteprune.config import load_config
from nuteprune.model.layers import build_view
from nuteprune.model.pairing import PairedModel
from nuteprune.runs.rundir import load_adapter, save_adapter

IDS = torch.arange(3, 22)[None]


@torch.no_grad()
@pytest.mark.parametrize("skip", [(), ("k_proj", "up_proj"), ("q_proj", "k_proj", "v_proj")])
def test_peft_opens_the_adapter_of_a_fused_model(tmp_path, skip):
    model, same = base_model("phi3"), base_model("phi3")
    spec, lora = read_spec(model.config), random_lora(model, rank=3, skip=skip)
    targets = [name for name in spec.lora_targets if name not in skip]
    config = load_config(None, ["lora.rank=3", "lora.alpha=6", f"lora.targets=[{','.join(targets)}]"])
    save_adapter(tmp_path, lora, config, spec)
    read = load_adapter(tmp_path)
    assert read.keys() == lora.keys()
    assert all(torch.equal(a, b) for key in lora for a, b in zip(read[key], lora[key], strict=True))
    wanted = PairedModel(model, spec, config.lora).logits(IDS, build_view(spec, None, lora, 2.0, torch.float32))
    got = PeftModel.from_pretrained(same, tmp_path).eval()(IDS).logits
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert (wanted - base_model("phi3")(IDS).logits).abs().max() > 1

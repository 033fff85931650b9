"""What ranks read before the first step: rank 0 downloads the model and packs the text, however long that takes."""

from functools import partial
from pathlib import Path

import pytest
import ranks
from hub import small_hub

pytestmark = pytest.mark.xdist_group("ranks")

DELAY, TIMEOUT = 14, 10


def use(address: str, cache: Path, rank: int) -> None:
    """Make an address the hub's on a rank; on any but the first, text cannot be packed."""
    from huggingface_hub import constants

    from nuteprune.data import text

    constants.ENDPOINT, constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE = address, str(cache), False
    constants.HUGGINGFACE_CO_URL_TEMPLATE = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    if rank:
        text.packed_blocks = None


def test_a_download_may_take_longer_than_ranks_wait_for_each_other(settings, model_dir, tmp_path):
    with small_hub(model_dir, delay=DELAY) as server:
        overrides = [f"model.path={server.name}", "deepspeed=zero3", f"train.rank_timeout={TIMEOUT}", "train.steps=2"]
        hook = partial(use, server.address, tmp_path / "cache")
        ranks.run(["prune", *settings, *overrides], 2, tmp_path / "logs", hook)
        assert server.sent.count("model.safetensors") == 1
    assert (tmp_path / "run" / "prepared" / "blocks.safetensors").is_file()

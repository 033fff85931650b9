"""A rank under ZeRO-3 whose memory is too small: all ranks end, the next start takes half the sequences at a time."""

import re
import resource
from pathlib import Path

import pytest
import ranks
from test_engine import metrics
from tiny import QUIET, tiny_model

from nuteprune.config import load_config
from nuteprune.stages import prune

pytestmark = pytest.mark.xdist_group("ranks")

ROOM = 280 << 20
"""Bytes that rank 1 may take beyond its start: a step on eight sequences takes 370 MB, one on four half of that."""


def limit(rank: int) -> None:
    """Give rank 1 a machine's end: the kernel refuses it more memory."""
    if rank == 1:
        held = int(re.search(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) << 10
        resource.setrlimit(resource.RLIMIT_DATA, (held + ROOM, resource.RLIM_INFINITY))


def test_the_next_start_takes_half_the_sequences_with_the_same_losses(tokenizer, text_file, tmp_path):
    base = tmp_path / "base"
    tiny_model("llama", intermediate_size=4096).save_pretrained(base)
    tokenizer.save_pretrained(base)
    settings = [
        f"model.path={base}", f"data.source={text_file}", "data.seq_len=256", "train.steps=1", "train.batch_size=16",
        "gates.init=drop_rate", "lora.refit=0", *QUIET,
    ]  # fmt: skip
    command = ["prune", *settings, f"run_dir={tmp_path / 'two'}", "deepspeed=zero3"]
    ended = ranks.Group(command, 2, tmp_path / "first", limit).wait()
    assert [rank.code for rank in ended] == [75, 75]
    assert ended[1].text.splitlines()[-1] == (
        "nuteprune: rank 1: out of memory at step 0: start the same command again, it goes on from the newest "
        "checkpoint with train.micro_batch=4"
    )
    ranks.run(command, 2, tmp_path / "second", limit)
    prune.run(load_config(None, [*settings, f"run_dir={tmp_path / 'one'}"]))
    one, two = ([line["prune/loss"] for line in metrics(tmp_path / name)] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-4)

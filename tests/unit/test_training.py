"""What ranks compare before they train."""

import pytest

from nuteprune.config import ConfigError, load_config
from nuteprune.parallel.distributed import World
from nuteprune.training.loop import check_alike


def ranks(**change) -> World:
    """Two ranks, of which the second sends something else."""

    class Pair(World):
        def gather(self, value):
            return [value, value | change]

    return Pair(size=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version of torch": "2.0"}, r"rank 1 has version of torch='2\.0', rank 0 '.+': start all ranks alike"),
        ({"train.lora_lr": 0.5}, r"rank 1 has train\.lora_lr=0\.5, rank 0 0\.003: start all ranks alike"),
    ],
)
def test_a_rank_with_other_versions_or_settings_is_named(change, message):
    with pytest.raises(ConfigError, match=message):
        check_alike(load_config(None, []), ranks(**change))


def test_alike_ranks_go_on_and_a_wrong_number_of_them_does_not():
    check_alike(load_config(None, []), ranks())
    with pytest.raises(ConfigError, match=r"train\.ranks is 3, but 2 started"):
        check_alike(load_config(None, ["train.ranks=3"]), ranks())

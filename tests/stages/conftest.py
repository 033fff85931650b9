"""Exports that the tests of export and those of serving share; they are in one xdist group."""

from itertools import product

import pytest
from exporting import SHAPES, asked, masked_logits, some_gates, some_ids, trained

from nuteprune.stages import export


@pytest.fixture(scope="session")
def exports(tmp_path_factory, request):
    """Each family exported in all shapes, to be read only: {(family, shape): (directory, wanted logits, gates)}."""
    made = {}
    for family, shape in product(asked(request), SHAPES):
        tmp_path = tmp_path_factory.mktemp(f"{family}-{shape}")
        config, model, gates, lora = trained(tmp_path, family, lambda s, k=shape: some_gates(s, k),
                                             **{"gates.shape": shape})  # fmt: skip
        directory = export.run(config)
        made[family, shape] = (directory, masked_logits(model, gates, lora, some_ids()), gates)
    return made

"""What a step costs beside its kernels, counted with launches stubbed: waits for the card, and dispatches a layer."""

import pytest
from overhead import BARS, counts

pytest.importorskip("triton", reason="triton has no build for this platform")

DISPATCHES = 100
"""Of one layer and micro-batch: teacher, student and backward."""


@pytest.mark.parametrize("phase", BARS)
def test_waits_and_dispatches_of_a_step(phase):
    few, many = counts(2, phase), counts(8, phase)
    assert few.waits == many.waits, "the card is waited for once a layer"
    assert many.waits.total() <= BARS[phase]
    assert (many.operations.total() - few.operations.total()) / 6 <= DISPATCHES


def test_a_further_micro_batch_waits_for_its_gates_while_they_are_sampled():
    positions = {"_local_scalar_dense": 1}  # transformers looks whether they are packed
    for phase, waits in (("sampled", positions | {"cpu": 1, "numpy": 1}), ("settled", positions)):
        one, two = counts(2, phase), counts(2, phase, batch=2)
        assert two.waits - one.waits == waits

"""Terms of the loss: what holds of each of them, whatever it computes."""

from dataclasses import replace

import pytest
import torch

from nuteprune.config import LossConfig
from nuteprune.config.said import UNREAD
from nuteprune.model.losses import IGNORE, TERMS, LayerTerm, OutputTerm, weights


def terms(kind: type):
    return [pytest.param(term, id=name) for name, term in TERMS.items() if isinstance(term, kind)]


@pytest.mark.parametrize("term", terms(OutputTerm))
def test_the_gradient_of_an_output_term_is_that_of_its_sum(term):
    config, generator = LossConfig(temperature=1.5), torch.Generator().manual_seed(0)
    student, teacher, direction = torch.randn(3, 5, 7, generator=generator, dtype=torch.float64)
    labels = torch.tensor([2, IGNORE, 6, 0, IGNORE])

    def of(logits):
        return term.of_chunk(logits.clone(), teacher.clone(), labels, config)

    _, slope = of(student)
    above, below = (of(student + sign * 1e-5 * direction)[0] for sign in (1, -1))
    torch.testing.assert_close((slope * direction).sum(), (above - below) / 2e-5, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("term", terms(LayerTerm))
def test_a_layer_term_reaches_the_student_alone_and_not_what_it_removed(term):
    student, teacher = (torch.randn(2, 5, 8, requires_grad=True) for _ in range(2))
    gate = torch.ones(8)
    gate[3] = 0
    term.of_layer(student, teacher.detach(), gate, None, LossConfig()).mean().backward()
    assert student.grad.abs().sum() > 0
    assert student.grad[..., 3].abs().sum() == 0


@pytest.mark.parametrize("name", TERMS)
def test_a_weight_of_0_turns_a_term_off(name):
    config = replace(LossConfig(), **{f"{other}_weight": 0.5 for other in TERMS})
    assert {term.name: weight for term, weight in weights(config, taught=True).items()} == dict.fromkeys(TERMS, 0.5)
    off = weights(replace(config, **{f"{name}_weight": 0.0}), taught=True)
    assert TERMS[name] not in off
    alone = weights(config, taught=False)
    assert all(not term.needs_teacher for term in alone)
    assert alone


@pytest.mark.parametrize("stage", ["finetune", "distill"])
@pytest.mark.parametrize("term", terms(LayerTerm))
def test_a_stage_without_layer_terms_refuses_their_weights(stage, term):
    assert f"loss.{term.name}_weight" in UNREAD[stage]

"""The teacher bank: what is recorded, who teaches when, and that a teacher in force costs nothing."""

from typing import get_args, get_type_hints

import pytest
import torch
from tiny import tiny_config

from nuteprune.arch import read_spec
from nuteprune.config import TeacherConfig
from nuteprune.masks import Gates, unit_shape
from nuteprune.model.lora import padded
from nuteprune.runs.snapshot_files import load_snapshots, save_snapshots
from nuteprune.training.teachers import TEACHERS, Numerous, Teacher

SPEC = read_spec(tiny_config("llama"))


def bank(**config) -> Numerous:
    return Numerous(SPEC, TeacherConfig(**{"lag": 10, "share": 1.0, **config}), 1.0, torch.device("cpu"), torch.float32)


def record(b: Teacher, sparsity: float, step: int = 0) -> bool:
    gates = Gates(ffn=torch.rand(unit_shape(SPEC, "ffn")))
    lora = {"0.q_proj": (torch.randn(2, SPEC.hidden), torch.randn(SPEC.heads * SPEC.head_dim, 2))}
    return b.record(step, sparsity, gates, {"ffn": torch.randn(unit_shape(SPEC, "ffn"))}, lora)


def test_one_snapshot_for_each_interval_that_is_passed():
    b = bank()
    kept = [s for s in (0.004, 0.0101, 0.013, 0.0199, 0.02, 0.05, 0.051, 0.29, 0.2901) if record(b, s)]
    assert kept == [0.0101, 0.02, 0.05, 0.29]


def test_every_percent_of_a_slow_rise_is_recorded_once():
    b = bank()
    for step in range(1, 501):
        record(b, step / 1000)
    assert [round(s.sparsity, 6) for s in b.snapshots] == [i / 100 for i in range(1, 51)]


def test_while_rising_the_teacher_is_ten_intervals_behind():
    b = bank()
    for percent in range(1, 31):
        record(b, percent / 100)
        index = b.index(0, 200, percent / 100)
        if percent <= 10:
            assert index is None
        else:
            assert b.snapshots[index].sparsity == pytest.approx((percent - 10) / 100)


def walk(b: Numerous, target: float, reached: int, total: int) -> list[float]:
    """Sparsity of the teacher at each step from `reached` on, 0 for the intact model."""
    b.observe(reached, target, target)
    chosen = [b.index(step, total, target) for step in range(reached, total)]
    return [0.0 if i is None else b.snapshots[i].sparsity for i in chosen]


@pytest.mark.parametrize(("target", "intact"), [(0.2, 0.5), (0.5, 0.2)])
def test_after_the_target_the_walk_goes_back_to_intact(target, intact):
    """The shares of the authors' code: each interval of the way back the same, the last ten the intact model's."""
    b = bank()
    for percent in range(1, round(100 * target) + 1):
        record(b, percent / 100)
    labels = walk(b, target, reached=100, total=1100)
    assert labels[0] == pytest.approx(target - 0.1)
    assert labels == sorted(labels, reverse=True)
    assert labels.count(0.0) / len(labels) == pytest.approx(intact, abs=0.01)
    counts = [labels.count(value) for value in set(labels) - {0.0, labels[0]}]
    assert max(counts) - min(counts) <= 1


def test_short_runs_with_holes_and_fewer_steps_than_teachers_still_walk():
    b = bank()
    for percent in (3, 8, 14, 19, 24, 30):
        record(b, percent / 100)
    assert walk(b, 0.3, reached=10, total=12) == pytest.approx([0.19, 0.03])
    assert walk(bank(), 0.3, reached=2, total=4) == [0.0, 0.0]


def test_the_walk_starts_when_the_student_is_there_not_when_the_schedule_is():
    b = bank()
    for percent in range(1, 31):
        record(b, percent / 100)
    for step, reached in ((50, 0.25), (60, 0.29), (70, 0.2951), (80, 0.31)):
        b.observe(step, reached, 0.3)
    assert b.reached == 70


def test_the_share_keeps_sparse_snapshots_from_teaching():
    b = bank(share=0.4)
    for percent in range(1, 51):
        record(b, percent / 100)
    assert b.snapshots[b.index(0, 200, 0.5)].sparsity == pytest.approx(0.20)
    assert b.index(0, 200, 0.12) == 1
    assert walk(b, 0.5, 100, 200)[0] == pytest.approx(0.20)


def test_what_can_never_teach_is_a_rung_on_the_disk_of_one_rank(tmp_path):
    known = SPEC, TeacherConfig(lag=10, share=0.4), 1.0, torch.device("cpu"), torch.float32, 0.5
    holds, knows = (Numerous(*known, rungs) for rungs in (tmp_path / "rungs", None))
    for b in (holds, knows):
        for percent in range(1, 51):
            assert record(b, percent / 100, percent)
            assert not record(b, percent / 100, percent)
    assert [s.sparsity for s in holds.snapshots] == [s.sparsity for s in knows.snapshots]
    assert [s.teaches for s in holds.snapshots] == [s.teaches for s in knows.snapshots] == [True] * 20 + [False] * 30
    for percent in range(1, 51):
        assert holds.index(0, 200, percent / 100) == knows.index(0, 200, percent / 100)
    assert knows.nbytes == holds.nbytes == sum(s.nbytes for s in holds.snapshots[:20])
    save_snapshots(tmp_path, holds.snapshots, rungs=holds.rungs)
    rung = load_snapshots(tmp_path)[-1]
    assert rung.gates.ffn is not None
    assert rung.scores
    assert not rung.lora
    assert [s.nbytes for s in load_snapshots(tmp_path, rungs=False)] == [s.nbytes for s in holds.snapshots]


def test_frozen_ranks_that_did_not_change_are_held_and_written_once(tmp_path):
    b, frozen = bank(), {"0.down_proj": (torch.randn(3, SPEC.ffn).bfloat16(), torch.randn(SPEC.hidden, 3).bfloat16())}
    room = padded(frozen, 5)  # of the ranks for which there was nothing to fit, none is kept
    others = {"0.down_proj": tuple(t * 2 for t in frozen["0.down_proj"])}
    for percent, ranks, fitted in ((1, room, 0), (2, room, 0), (3, others, 4)):
        gates = Gates(ffn=torch.rand(unit_shape(SPEC, "ffn")))
        b.record(percent, percent / 100, gates, {}, {"0.q_proj": (torch.randn(2, 4), torch.randn(4, 2))}, ranks, fitted)
    first, second, third = b.snapshots
    assert first.frozen is second.frozen
    assert b.nbytes == sum(s.nbytes for s in b.snapshots) + 2 * sum(t.nbytes for t in frozen["0.down_proj"])
    assert len(b.activate(2).layers[0].states["down_proj"].lora[0]) == 3
    save_snapshots(tmp_path, b.snapshots)
    assert len(list(tmp_path.rglob("frozen-*"))) == 2
    back = load_snapshots(tmp_path)
    assert back[0].frozen is back[1].frozen
    for mine, theirs in zip(back, b.snapshots, strict=True):
        for what in ("lora", "frozen"):
            for key, pair in getattr(theirs, what).items():
                assert all(torch.equal(x, y) for x, y in zip(getattr(mine, what)[key], pair, strict=True))
    assert third.frozen is not second.frozen


def test_what_snapshots_share_stays_shared_in_memory_for_a_card(tmp_path, monkeypatch):
    b, frozen = bank(), {"0.down_proj": (torch.randn(3, SPEC.ffn), torch.randn(SPEC.hidden, 3))}
    for percent in (1, 2, 3):
        gates = Gates(ffn=torch.rand(unit_shape(SPEC, "ffn")))
        b.record(percent, percent / 100, gates, {}, {"0.q_proj": (torch.randn(2, 4), torch.randn(4, 2))}, frozen)
    save_snapshots(tmp_path, b.snapshots)
    resumed = bank()
    resumed.device = torch.device("cuda")
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    resumed.restore(load_snapshots(tmp_path))
    assert resumed.nbytes == b.nbytes


def test_snapshots_keep_gates_exactly_and_lora_as_bf16_on_the_host():
    b = bank()
    record(b, 0.02)
    s = b.snapshots[0]
    assert s.gates.ffn.dtype == torch.float32
    assert s.lora["0.q_proj"][0].dtype == torch.bfloat16
    expected = 2 * s.gates.ffn.nbytes + sum(t.nbytes for t in s.lora["0.q_proj"])
    assert b.nbytes == s.nbytes == expected


def test_a_snapshot_does_not_follow_the_student():
    b, lora = bank(), {"0.q_proj": (torch.ones(2, 24), torch.ones(36, 2))}
    gates = Gates(ffn=torch.ones(unit_shape(SPEC, "ffn")))
    b.record(0, 0.02, gates, {}, lora)
    lora["0.q_proj"][0].zero_()
    gates.ffn.zero_()
    assert (b.snapshots[0].lora["0.q_proj"][0] == 1).all()
    assert (b.snapshots[0].gates.ffn == 1).all()


def test_activating_the_same_teacher_again_copies_nothing():
    b = bank()
    record(b, 0.02)
    first = b.activate(0)
    assert b.activate(0) is first
    assert b.activate(None) is not first
    assert b.activate(None) is b.activate(None)


def test_every_mode_is_a_policy():
    assert tuple(TEACHERS) == get_args(get_type_hints(TeacherConfig)["mode"])


@pytest.mark.parametrize("policy", TEACHERS.values())
def test_what_holds_of_every_policy(policy):
    """Two ranks that record alike are taught alike, by a view that stays while the teacher does."""
    config = TeacherConfig(lag=1, share=1.0)
    ranks = [policy(SPEC, config, 1.0, torch.device("cpu"), torch.float32) for _ in range(2)]
    for percent in range(1, 21) if policy.records else ():
        for teacher in ranks:
            torch.manual_seed(percent)
            record(teacher, percent / 100, percent)
    for step in (0, 9):
        one, other = (teacher.view(step, 10, 0.2) for teacher in ranks)
        assert (one is not None) is policy.taught
        assert one is ranks[0].view(step, 10, 0.2)
        if one is not None:
            torch.testing.assert_close(*(view.layers[0].states["down_proj"].in_gate for view in (one, other)))
        assert ranks[0].sparsity(step, 10, 0.2) == ranks[1].sparsity(step, 10, 0.2) <= policy.limit(config, 0.2) + 1e-9

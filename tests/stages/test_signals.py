"""Signals to the real command line: it says what it saved, also while it still loads, and a second Ctrl-C ends it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from nuteprune import chain
from nuteprune.training.signals import stop_signals

ROOT = Path(__file__).parents[2]
HANG = 240
SLOW = (
    "import sys, time; from nuteprune.stages import prune; from nuteprune.__main__ import cli; "
    "step = prune.Pruning.train_step; "
    "prune.Pruning.train_step = lambda trainer: (time.sleep(60 * (trainer.step > 2)), step(trainer))[1]; cli()"
)
"""The command line with a third step of a minute."""

TWO = (
    "from nuteprune import chain; from nuteprune.planning.machine import Machine; from nuteprune.__main__ import cli; "
    "chain.this_machine = lambda: Machine('two processes', 2); cli()"
)
"""The command line on a machine of two ranks, whatever it has."""


@pytest.fixture
def start():
    """Starts a process of Python, given its arguments; what is left of it at the end is killed."""
    processes = []

    def begin(*arguments) -> subprocess.Popen:
        processes.append(subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stderr=subprocess.PIPE, text=True))
        return processes[-1]

    yield begin
    for process in processes:
        process.kill()
        process.wait()


def until(condition, process) -> None:
    limit = time.monotonic() + HANG
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < limit
        time.sleep(0.005)


def catches(process, number) -> bool:
    """Whether a process handles a signal itself (proc(5): SigCgt)."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (number - 1) & 1)


def has_loaded(process, library) -> bool:
    return library in Path(f"/proc/{process.pid}/maps").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("number", "library"), [(signal.SIGTERM, ""), (signal.SIGUSR1, "libtorch_cpu"), (signal.SIGINT, "tokenizers")]
)
def test_a_signal_while_it_loads_ends_with_a_line(start, settings, tmp_path, number, library):
    process = start("-m", "nuteprune", "prune", *settings)
    until(lambda: catches(process, signal.SIGUSR1) and has_loaded(process, library), process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=HANG)
    assert process.returncode == 75, errors
    assert errors.splitlines()[-1] == (
        f"nuteprune: {number.name} outside of training: what was finished is kept, start again"
    )
    assert "Traceback" not in errors
    assert not (tmp_path / "run/checkpoints").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_a_signal_in_a_stage_without_steps_is_one_line(start, settings, text_file, tmp_path, number):
    long = tmp_path / "long.txt"  # several seconds, so that no busy machine is done before the signal comes
    long.write_text(text_file.read_text() * 300)
    process = start("-m", "nuteprune", "prepare", *settings, f"data.source={long}")
    until(lambda: has_loaded(process, "tokenizers"), process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=HANG)
    told = f"nuteprune: {number.name} outside of training: what was finished is kept, start again"
    assert (process.returncode, errors.splitlines()[-1]) == (75, told)
    assert "Traceback" not in errors


def test_ctrl_c_saves_after_the_step_and_a_second_one_ends_at_once(start, settings, tmp_path):
    run_dir = tmp_path / "run"
    process = start("-c", SLOW, "prune", *settings, "checkpoint.every=1")
    until(lambda: (run_dir / "checkpoints/step-00000003/manifest.json").exists(), process)
    process.send_signal(signal.SIGINT)
    lines = iter(process.stderr.readline, "")
    assert any("ending after this step; Ctrl-C again ends at once" in line for line in lines)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(HANG) == -signal.SIGINT
    assert time.monotonic() - began < 20
    process.stderr.close()

    process = start("-m", "nuteprune", "prune", *settings, "checkpoint.every=1")
    until(lambda: len((run_dir / "metrics.jsonl").read_text().splitlines()) > 5, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=HANG)
    assert process.returncode == 75, errors
    assert "resumed at step 3" in errors
    steps = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert errors.splitlines()[-1].startswith(f"nuteprune: SIGINT at step {len(steps)} of 60: saved; start again")
    assert (run_dir / f"checkpoints/step-{len(steps):08d}/manifest.json").exists()
    assert steps == list(range(len(steps)))


def test_ctrl_c_of_a_run_of_several_ranks_saves_and_leaves_none_behind(start, settings, tmp_path):
    run_dir = tmp_path / "run"
    process = start("-c", TWO, "run", *settings, "train.steps=3000", "distill.steps=0", "data.documents=19")
    metrics = run_dir / "metrics.jsonl"
    until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 2, process)
    ranks = psutil.Process(process.pid).children(recursive=True)
    assert len(ranks) > 2  # the launcher too
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=HANG)
    assert process.returncode == 75, errors
    assert "nuteprune: SIGTERM at step" in errors
    assert errors.splitlines()[-1] == "nuteprune: prune was told to stop: what it saved stands above, start again"
    _, alive = psutil.wait_procs(ranks, timeout=10)
    assert not alive
    steps = len(metrics.read_text().splitlines())
    assert (run_dir / f"checkpoints/step-{steps:08d}/manifest.json").exists()


def test_a_run_of_several_ranks_has_their_exit_code(tmp_path, monkeypatch):
    """75 where one is lost, 2 where all of them refuse their settings; torchrun's own is 1."""
    (settings := tmp_path / "run.yaml").write_text("trian: {steps: 3}")
    with pytest.raises(chain.StageFailed, match="prune ended with exit code 2") as refused:
        chain._on_all_cards("prune", settings, 2)
    assert refused.value.exit_code == 2
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal\nif os.environ.get('RANK') == '1': os.kill(os.getpid(), signal.SIGKILL)"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(chain.StageFailed) as lost:
        chain._on_all_cards("prune", settings, 2)
    assert lost.value.exit_code == 75


def test_a_second_ctrl_c_ends_ranks_that_do_not_leave(start):
    deaf = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(999)"
    )
    code = (
        "import subprocess, sys; from pathlib import Path; from nuteprune import chain; "
        "from nuteprune.training.signals import stop_signals\n"
        "real = subprocess.Popen\n"
        f"subprocess.Popen = lambda *_, **how: real([sys.executable, '-c', {deaf!r}], stdout=sys.stderr, **how)\n"
        "with stop_signals(): chain._on_all_cards('prune', Path('runs/none/run.yaml'), 2)"
    )
    process = start("-c", code)
    assert process.stderr.readline() == "deaf\n"
    ranks = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(HANG) == -signal.SIGINT
    _, alive = psutil.wait_procs(ranks, timeout=10)
    assert not alive
    process.stderr.close()


def test_a_signal_that_a_finalizer_swallows_is_kept_and_not_shown(monkeypatch):
    class Interrupted:
        def __del__(self):
            signal.raise_signal(signal.SIGUSR1)

    shown = []
    monkeypatch.setattr(sys, "unraisablehook", shown.append)
    with stop_signals() as stop:
        Interrupted()
        assert stop.received == "SIGUSR1"
    assert not shown
    assert sys.unraisablehook == shown.append


def test_a_system_without_posix_signals_is_told_so_in_one_line():
    code = "import signal; del signal.SIGUSR1; import nuteprune.__main__"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "nuteprune: does not run on Windows itself: start it inside WSL\n"

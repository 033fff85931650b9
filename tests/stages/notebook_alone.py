"""What a notebook does with the Python API, in one process: `notebook_alone.py RUN_DIR MODEL TEXT [key.sub=value …]`.

Prints a line of what a call has left changed in the process, and at the end a line that tells that all went well.
"""

import logging
import os
import random
import signal
import sys
import threading
import warnings

import numpy as np
import torch

import nuteprune
from nuteprune.errors import UserError


def state() -> dict:
    """What a call could leave changed."""
    loggers = [logging.root, *(each for each in logging.root.manager.loggerDict.values() if hasattr(each, "handlers"))]
    return {
        "environment": dict(os.environ),
        "logging": {each.name: (each.level, list(each.handlers), each.propagate) for each in loggers},
        "warnings": list(warnings.filters),
        "signals": [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)],
        "hooks": (sys.unraisablehook, sys.excepthook, threading.excepthook),
        "threads": torch.get_num_threads(),
        "running": {each.name for each in threading.enumerate()} - {"tqdm_monitor"},
        "generators": (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()),
        "process group": torch.distributed.is_initialized(),
    }


def unchanged(name: str, call, *arguments, **flags):
    """What a call returns; says what it has changed."""
    before = state()
    try:
        return call(*arguments, **flags)
    finally:
        after = state()
        after["logging"] = {key: value for key, value in after["logging"].items() if key in before["logging"]}
        for key in before:
            if before[key] != after[key]:
                print(f"{name} changed {key}: {before[key]} -> {after[key]}")


def main() -> None:
    run_dir, model, text, *more = sys.argv[1:]
    settings = {"run_dir": run_dir, "model": {"path": model}, "data": {"source": text, "seq_len": 32}}
    logging.basicConfig(level=logging.WARNING)
    torch.manual_seed(5)
    unchanged("prepare", nuteprune.prepare, settings, more)
    unchanged("prune", nuteprune.prune, settings, more)
    try:
        unchanged("a mistake", nuteprune.prune, settings, [*more, "seed=5"])
    except UserError as error:
        print(error)
    export = unchanged("export", nuteprune.export, run_dir)
    unchanged("distill", nuteprune.distill, run_dir, ["distill.steps=2"])
    masked = unchanged("load_masked", nuteprune.load_masked, run_dir)
    report = unchanged("evaluate", nuteprune.evaluate, run_dir,
                       ["evaluate.window=32", "evaluate.batch_sizes=[]", "evaluate.tasks=[local_mc]",
                        "evaluate.task_limit=2"])  # fmt: skip
    assert len(repr(masked)) < len(repr(report)) < 2000
    unchanged("plan", nuteprune.plan, settings, [*more, "deepspeed="], gpu="h100", gpus_per_node=1)

    from lm_eval.models.huggingface import HFLM
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

    arguments = TrainingArguments(output_dir=f"{run_dir}/trained", use_cpu=True, max_steps=2, report_to=[],
                                  disable_tqdm=True, save_strategy="no")  # fmt: skip
    assert arguments.device == torch.device("cpu")
    assert HFLM(pretrained=str(export), device="cpu", batch_size=1).tokenizer is not None
    tokenizer = AutoTokenizer.from_pretrained(export)
    small = AutoModelForCausalLM.from_pretrained(export)
    ids = tokenizer("The river", return_tensors="pt").input_ids
    with torch.no_grad():
        compiled = torch.compile(small, fullgraph=True, backend="eager")(input_ids=ids).logits
        torch.testing.assert_close(compiled, small(input_ids=ids).logits)
    tuned = get_peft_model(small, LoraConfig(target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    rows = [{"input_ids": ids[0], "labels": ids[0]}] * 4
    Trainer(tuned, arguments, train_dataset=rows).train()
    assert tuned.generate(input_ids=ids, max_new_tokens=4, do_sample=False).shape[1] > ids.shape[1]
    print("all went well")


if __name__ == "__main__":
    main()

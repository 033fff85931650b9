"""A page in headless Chromium: what its console says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

NAMES = ("chromium", "google-chrome", "chromium-browser")


def find_chromium() -> str:
    """The browser; without one the test fails in CI and is skipped elsewhere."""
    if found := next(filter(None, map(shutil.which, NAMES)), None):
        return found
    reason = "no Chromium here (.ci/run installs it: apt-get install chromium)"
    if os.environ.get("CI"):
        pytest.fail(reason)
    return pytest.skip(reason)


def console(page: Path) -> tuple[str, list[str]]:
    """The document as the browser has it after loading, and the lines of its console."""
    with tempfile.TemporaryDirectory() as profile:
        command = [
            find_chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            f"--user-data-dir={profile}", "--enable-logging=stderr", "--dump-dom", page.resolve().as_uri(),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, re.findall(r"CONSOLE[:(]\d+\)?\] (.*)", done.stderr)

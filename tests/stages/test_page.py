"""The report's page: whole HTML, nothing fetched, nothing run, whatever names and texts came with a model."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browser import console

from nuteprune.config import load_config
from nuteprune.evaluation.page import html
from nuteprune.stages import evaluate

pytestmark = pytest.mark.xdist_group("page")

EVIL = "<img src=x onerror=alert(1)>"
VOID = {"meta", "link", "img", "br"}


@pytest.fixture(scope="module")
def folder(finished_run, model_dir, text_file, tmp_path_factory) -> Path:
    """The report of two models with names and texts that would steer a browser, beside a run's curves."""
    tmp_path = tmp_path_factory.mktemp("page")
    run_dir = shutil.copytree(finished_run, tmp_path / "run")
    paths = [shutil.copytree(model_dir, tmp_path / name) for name in (EVIL, "export")]
    record = {"kept": {"ffn": [[0, 1], [], list(range(40))]}, "original": {"ffn": 40}}
    (paths[1] / "nuteprune.json").write_text(json.dumps(record))
    text = tmp_path / f"{EVIL}.txt"
    text.write_text(text_file.read_text() + "\n\n</p><script>alert(1)</script>\n\n" * 40)
    evaluate.run(load_config(run_dir, [
        f"evaluate.models={json.dumps(list(map(str, paths)))}", f"evaluate.text={json.dumps([str(text)])}",
        "evaluate.batch_sizes=[]", "evaluate.window=32", "evaluate.blocks=2",
    ]))  # fmt: skip
    return run_dir / "evaluate"


class Strict(HTMLParser):
    """Holds that each element is closed where it should be, and notes what a page refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.references: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag, attributes):
        self.seen.add(tag)
        self.references += [value for name, value in attributes if name in ("src", "href", "xlink:href", "srcset")]
        self.references += re.findall(r"url\(([^)]*)\)", " ".join(value or "" for _, value in attributes))
        self.ids += [value for name, value in attributes if name == "id"]
        assert not any(name.startswith("on") for name, _ in attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_refers_to_nothing_outside(folder):
    text = (folder / "report.html").read_text(encoding="utf-8")
    parser = Strict()
    parser.feed(text)
    parser.close()
    assert not parser.open
    assert {"table", "svg", "code"} <= parser.seen
    assert not {"script", "img", "iframe", "object", "form"} & parser.seen
    assert parser.references
    assert all(reference.startswith(("#", "data:")) for reference in parser.references)
    assert len(parser.ids) == len(set(parser.ids))
    assert {reference[1:] for reference in parser.references if reference.startswith("#")} <= set(parser.ids)
    style = text[text.index("<style>") : text.index("</style>")]
    assert "@import" not in style
    assert "url(" not in style
    report = json.loads((folder / "report.json").read_text())
    assert all(len(model["samples"]) == 3 for model in report["models"])
    assert "<svg" not in html(report, {})


def test_a_browser_has_nothing_to_say_of_the_page(folder, tmp_path):
    document, lines = console(folder / "report.html")
    assert lines == []
    assert document.count("</svg>") == 2
    # The same browser does speak of a page that fetches or runs something.
    broken = tmp_path / "broken.html"
    text = (folder / "report.html").read_text(encoding="utf-8")
    broken.write_text(text.replace("</body>", f"{EVIL}<script>alert(1)</script></body>"), encoding="utf-8")
    _, lines = console(broken)
    assert len(lines) >= 2

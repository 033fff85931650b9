"""The report as one page: no script, nothing fetched, bright or dark as the reader has it, readable on a phone."""

from __future__ import annotations

import re
from html import escape

from nuteprune.evaluation import contents
from nuteprune.runs.words import one_line, plain

WIDTH = 5.0
"""Inches of a picture: its labels are read on a phone too."""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""What a browser may do with the page, whatever a model wrote into it: show it."""
STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #5d6672; --line: #dde1e6; --paper: #fff; --panel: #f5f6f8;
  --blue: #2b6cb0; --orange: #c05621; --warn: #b03030 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --soft: #9aa4b0; --line: #30363d; --paper: #14171b;
  --panel: #1d2126; --blue: #63a4e8; --orange: #f0954f; --warn: #ff8a80 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 2rem 1rem 4rem; max-width: 66rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.1rem; color: var(--soft); font-weight: 600; margin: 0 }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem }
h3 { font-size: .8rem; margin: 0 0 .3rem; color: var(--soft); font-weight: 600 }
.headline { font-size: 1.35rem; line-height: 1.45; margin: .4rem 0 1.5rem; text-wrap: pretty }
.small, .small li { color: var(--soft); font-size: .875rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; overflow-wrap: normal }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
th { color: var(--soft); font-size: .875rem; font-weight: 600 }
th:first-child, td:first-child { text-align: left; padding-left: 0; white-space: normal; min-width: 9rem }
td.under { color: var(--soft) } td.under:first-child { padding-left: 1rem }
code { font: .9em ui-monospace, monospace; background: var(--panel); padding: .1em .3em; border-radius: .25rem }
pre { background: var(--panel); padding: .7rem .9rem; border-radius: .5rem; overflow-x: auto; font-size: .875rem }
.cards { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr)) }
.pictures { align-items: start; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)) }
.pictures h2 { margin-top: 1.5rem }
svg { display: block; width: 100%; height: auto; max-width: 34rem; fill: currentColor }
svg text { font-family: system-ui, sans-serif !important }
.sample { margin: 0 0 1.5rem } .sample > p { margin: 0 0 .6rem; white-space: pre-wrap }
.sample .cards > div { background: var(--panel); border-radius: .5rem; padding: .7rem .9rem }
.text { white-space: pre-wrap; margin: 0 } .loop { color: var(--warn) }
ul { padding-left: 1.1rem }
@media (max-width: 34rem) { table { font-size: .78rem } th, td { padding: .3rem .25rem; font-size: inherit }
  th:first-child, td:first-child { min-width: 6rem } .headline { font-size: 1.15rem } }
"""


def html(report: dict, pictures: dict[str, str]) -> str:
    """The page.

    Args:
        report: as `report.write` writes it.
        pictures: SVG by name: `kept`, `training`.
    """
    name = one_line(report["models"][0]["name"])
    parts = [
        f"<h1>NutePrune: {escape(name)}</h1>",
        f'<p class="headline">{_sentence(contents.headline(report))}</p>',
        *(f'<p class="small">{_sentence(line)}</p>' for line in contents.made_lines(report)),
        _table(contents.rows(report)),
        *_tasks(report),
        *_pictures(pictures),
        *_samples(report),
        "<h2>How it was measured</h2>",
        *(f'<p class="small">{_sentence(line)}</p>' for line in contents.conditions(report)),
        _list([*contents.model_lines(report), *contents.environment_lines(report)]),
        "<h2>Load it</h2>",
        f"<pre>{escape(chr(10).join(contents.load_lines(report)))}</pre>",
    ]  # fmt: skip
    head = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<title>NutePrune: {escape(name)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n"
    )
    return head + "<body>\n" + "\n".join(parts) + "\n</body>\n</html>\n"


def _sentence(text: str) -> str:
    """A sentence whose names stand between backticks."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(text))


def _table(rows: list[list[str]]) -> str:
    head, *body = rows
    cells = ["<tr>" + "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head) + "</tr>"]
    for row in body:
        under = ' class="under"' * row[0].startswith(" ")
        cells.append("<tr>" + "".join(f"<td{under}>{escape(cell.strip())}</td>" for cell in row) + "</tr>")
    return '<div class="wide"><table>\n' + "\n".join(cells) + "\n</table></div>"


def _tasks(report: dict) -> list[str]:
    found = contents.task_rows(report)
    return (
        ["<h2>Tasks</h2>", _table(found), f'<p class="small">{_sentence(contents.task_conditions(report))}</p>']
        if found
        else []
    )


def _pictures(pictures: dict[str, str]) -> list[str]:
    names = {"training": "Loss and sparsity over the steps, and their running mean", "kept": "What each layer kept"}
    drawn = [f"<div><h2>{title}</h2>{pictures[key]}</div>" for key, title in names.items() if key in pictures]
    return ['<div class="cards pictures">', *drawn, "</div>"] if drawn else []


def _samples(report: dict) -> list[str]:
    """The prompts, and beside each other what the models wrote behind them."""
    parts = []
    for written in contents.samples(report):
        prompt = written[0]["prompt"]
        parts.append(f'<div class="sample"><p>{_text(prompt)} …</p><div class="cards">')
        for title, own in zip(contents.titles(report), written, strict=True):
            mark = ' <span class="loop">a loop</span>' * own["loops"]
            behind = "" if own["prompt"] == prompt else f'<p class="small">{_text(own["prompt"])} …</p>'
            text = _text(own["continuation"])
            parts.append(f'<div><h3>{escape(title)}{mark}</h3>{behind}<p class="text">{text}</p></div>')
        parts.append("</div></div>")
    return ["<h2>Samples</h2>", *parts] if parts else []


def _text(words: str) -> str:
    return escape(plain(words.strip()))


def _list(lines: list[str]) -> str:
    return '<ul class="small">' + "".join(f"<li>{_sentence(line)}</li>" for line in lines) + "</ul>"

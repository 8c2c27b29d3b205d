"""The demo's HTML report: one self-contained file with the table, the bars and the pictures.

What it is: a few templates over results and pictures that `recipes/demo.py` made. What it is not: a
place where anything is measured.
"""

from __future__ import annotations

import base64
import html
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

STYLE = """
:root{--ink:#1d2733;--mute:#66727f;--line:#dfe4ea;--warn:#c2410c;--ok:#0f766e;--paper:#fff}
*{box-sizing:border-box}
body{font:16px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif;color:var(--ink);
margin:0 auto;max-width:1060px;padding:32px 20px 80px;background:var(--paper)}
h1{font-size:30px;margin:0 0 4px}h2{font-size:21px;margin:44px 0 8px;padding-top:14px;
border-top:1px solid var(--line)}p.lead{color:var(--mute);margin-top:0}
table{border-collapse:collapse;width:100%;font-size:14px;font-variant-numeric:tabular-nums}
th,td{padding:6px 8px;border-bottom:1px solid var(--line);text-align:right}
th:first-child,td:first-child,th:nth-child(2),td:nth-child(2){text-align:left}
td small{color:var(--mute)}
.card{display:flex;align-items:flex-start;gap:16px;flex-wrap:wrap;
padding:14px 0;border-bottom:1px solid var(--line)}
.card img,.maps img{width:176px;border-radius:6px;display:block}
.maps{display:flex;gap:10px;flex-wrap:wrap}figure{margin:0;width:176px}
figcaption{font-size:13px;color:var(--mute);margin-top:4px}
.say{flex:1;min-width:280px}.warn{color:#fff;background:var(--warn);border-radius:4px;padding:0 5px}
.seen{color:var(--ok);font-weight:600}b.arm{display:inline-block;min-width:70px;color:var(--mute);
font-weight:500}
"""


def picture(image: Image.Image) -> str:
    """An `img` tag that carries its picture."""
    buffer = BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=88)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="" src="data:image/jpeg;base64,{data}">'


def marked(answer: str, words: list[dict[str, Any]]) -> str:
    """The answer with its object words marked: warned, or seen."""
    parts, at = [], 0
    for word in sorted(words, key=lambda w: w["span"][0]):
        start, end = word["span"]
        kind = "warn" if word["warned"] else "seen"
        title = f"support {word['support']:.2f}"
        parts.append(html.escape(answer[at:start]))
        parts.append(
            f'<span class="{kind}" title="{title}">{html.escape(answer[start:end])}</span>'
        )
        at = end
    return "".join(parts) + html.escape(answer[at:])


def results_table(rows: list[dict[str, Any]], names: dict[str, str]) -> str:
    """Splits x metrics down, arms across; each cell with its interval and n."""
    arms = list(dict.fromkeys(r["arm"] for r in rows))
    cells = {(r["split"], r["metric"], r["arm"]): r for r in rows}
    keys = list(dict.fromkeys((r["split"], r["metric"]) for r in rows))
    head = "".join(f"<th>{html.escape(a)}</th>" for a in arms)
    body = []
    for split, metric in keys:
        line = f"<td>{split}</td><td>{names.get(metric, metric)}</td>"
        for arm in arms:
            line += f"<td>{_cell(cells.get((split, metric, arm)))}</td>"
        body.append(f"<tr>{line}</tr>")
    return f"<table><tr><th>split</th><th>metric</th>{head}</tr>{''.join(body)}</table>"


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    value, low, high = row["value"], row["low"], row["high"]
    return f"{value:.3f} <small>[{low:.3f}, {high:.3f}] n={row['n']}</small>"


def word_maps(example: dict[str, Any]) -> str:
    """The example's heatmaps, one a word."""
    figures = "".join(
        f"<figure>{picture(w['map'])}<figcaption>{html.escape(w['text'])}: support "
        f"{w['support']:.2f}{', warned' if w['warned'] else ''}</figcaption></figure>"
        for w in example["words"]
    )
    return (
        f'<div class="card">{picture(example["image"])}<div class="say">'
        f"<p>{marked(example['answer'], example['words'])}</p>"
        f'<div class="maps">{figures}</div></div></div>'
    )


def before_after(example: dict[str, Any]) -> str:
    """One scene's truth, plain and steered answer."""
    lines = "".join(
        f'<p><b class="arm">{arm}</b> {html.escape(example[arm])}</p>'
        for arm in ("truth", "plain", "steered")
    )
    return f'<div class="card">{picture(example["image"])}<div class="say">{lines}</div></div>'


def write_report(path: Path, title: str, lead: str, sections: list[tuple[str, str, str]]) -> None:
    """One file: (heading, text, html) a section; written aside and renamed."""
    blocks = "".join(f"<h2>{html.escape(h)}</h2><p>{t}</p>{b}" for h, t, b in sections)
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>"
        f'<h1>{html.escape(title)}</h1><p class="lead">{lead}</p>{blocks}</body></html>'
    )
    aside = path.with_suffix(".aside")
    aside.write_text(page, encoding="utf-8")
    aside.rename(path)

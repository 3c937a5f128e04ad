"""One static page of a booksum record: what was written, beside what a person wrote. Nothing is loaded, nothing is executed."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:110em;padding:0 1em;color:#222}"
    "section{border-top:2px solid #888;margin-top:2em}"
    ".side{display:grid;grid-template-columns:repeat(auto-fill,minmax(24em,1fr));gap:1em;align-items:start}"
    "article{border:1px solid #ccc;border-radius:6px;padding:.7em 1em;background:#fafafa}"
    "article.reference{background:#eef6ee;border-color:#8b8}h3{margin:.2em 0;font-size:1em}"
    "pre{white-space:pre-wrap;overflow-wrap:anywhere;font:inherit;margin:.5em 0}.scores{color:#666;font-size:.85em}"
    "details{margin:.6em 0}"
)


def booksum_page(record: Mapping[str, Any]) -> str:
    """HTML: a section for each pair, in which the reference and all outputs for the whole book stand side by side; shorter inputs are folded away.

    Args:
        record: of kind "booksum", with rows as in `infini.report.booksum.booksum_table`. Every text of it is escaped.
    """
    pairs: dict[str, list] = {}
    for row in record["rows"]:
        pairs.setdefault(row["pair"], []).append(row)
    links = "".join(f'<li><a href="#pair{i}">{escape(name)}</a></li>' for i, name in enumerate(pairs))
    sections = "".join(_section(i, name, rows) for i, (name, rows) in enumerate(pairs.items()))
    about = escape(f"{record['command']} · {record['started']}")
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<title>Summaries of whole books</title><style>{_STYLE}</style></head>\n<body><h1>Summaries of whole books</h1>"
        f'<p class="scores">{about}</p><ol>{links}</ol>\n{sections}</body></html>\n'
    )


def _section(number: int, name: str, rows: list[Mapping[str, Any]]) -> str:
    seen, whole, shorter = set(), [], []
    for row in rows:
        for output in row["outputs"]:
            key = (row["variant"], output["text"]) if row["nll"] is None else None
            if key is None or key not in seen:  # what needs no model is the same beside every model
                seen.add(key)
                (shorter if row["length"] is not None and "first" not in row["variant"] else whole).append(_article(row, output))
    reference = f'<article class="reference"><h3>written by a person</h3><pre>{escape(rows[0]["reference"])}</pre></article>'
    folded = ""
    if shorter:
        folded = f'<details><summary>after parts of the book: {len(shorter)}</summary><div class="side">{"".join(shorter)}</div></details>'
    return f'<section id="pair{number}"><h2>{escape(name)}</h2><div class="side">{reference}{"".join(whole)}</div>{folded}</section>\n'


def _article(row: Mapping[str, Any], output: Mapping[str, Any]) -> str:
    title = row["variant"] if row["nll"] is None else f"{row['model']}, {row['variant']}, {row['input_tokens']:,} tokens read, {output['decoding']}"
    scores = [f"ROUGE-1/2/L {' / '.join(format(100 * output[name], '.1f') for name in ('rouge1', 'rouge2', 'rougeL'))}"]
    for name, called in (("entity_recall", "entity recall"), ("copy_rate", "copied")):
        if output[name] is not None:
            scores.append(f"{called} {output[name]:.0%}")
    if row["nll"] is not None:
        scores.append(f"gap {row['nll_wrong'] - row['nll']:.1f} nats")
    scores.append(f"{output['words']} words{'' if output['ended'] else ', cut off'}")
    return f'<article><h3>{escape(title)}</h3><p class="scores">{escape(" · ".join(scores))}</p><pre>{escape(output["text"])}</pre></article>'

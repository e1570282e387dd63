"""The parts that a page is made of: text that is safe in HTML, tables that sort and filter, and the page around them.

Everything that is in the page is in the one file: styles, the script, and the two libraries that draw (onnxprune/page); a
Content-Security-Policy in it forbids every request.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from string import Template
from typing import Any

KINDS = {"n": "n", "l": "line", "w": "wide"}  # of columns, their classes
LIBRARIES = ("d3.min.js", "plot.umd.min.js")


@dataclass(frozen=True)
class Html:
    """Text that is HTML already; all other text is escaped where it is put in."""

    text: str


@dataclass(frozen=True)
class Cell:
    """What a cell shows, and the number that it is sorted by."""

    content: object
    value: float


@dataclass(frozen=True)
class Section:
    """A part of the page: the id that links go to, its heading, and what is in it."""

    id: str
    title: str
    body: Html


def markup(content: object) -> str:
    """HTML of a cell, of HTML, or of anything else's text."""
    if isinstance(content, Cell):
        return markup(content.content)
    return content.text if isinstance(content, Html) else html.escape(str(content))


def join(parts: Iterable[object], between: str = "") -> Html:
    return Html(between.join(markup(part) for part in parts))


def element(tag: str, *content: object, **attributes: object) -> Html:
    """<tag …>content</tag>; attributes: class_ is class, aria_label aria-label; those that are None are left out, True stands alone."""
    given = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items() if value is not None}
    text = "".join(f" {name}" if value is True else f' {name}="{html.escape(str(value))}"' for name, value in given.items())
    return Html(f"<{tag}{text}>{join(content).text}</{tag}>")


def code(text: object) -> Html:
    return element("code", text)


def table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, id: str, search: str = "", kinds: str = "") -> Html:
    """A table whose headers sort it, with a box that filters its rows where `search` says what for.

    kinds: a letter for each column, n for numbers, l for those that stay in one line, w for wide ones.  A row's first cell is its header.
    """
    aligned = [KINDS.get(letter) for letter in kinds.ljust(len(columns))]
    head = [
        element("th", element("button", title, type="button"), scope="col", class_=align)
        for title, align in zip(columns, aligned, strict=True)
    ]
    body = []
    for row in rows:
        cells = []
        for i, (cell, align) in enumerate(zip(row, aligned, strict=True)):
            value = f"{cell.value:.9g}" if isinstance(cell, Cell) and math.isfinite(cell.value) else None
            cells.append(element("td" if i else "th", cell, scope=None if i else "row", class_=align, data_v=value))
        body.append(element("tr", *cells))
    grid = element(
        "table",
        element("caption", caption),
        element("thead", element("tr", *head)),
        element("tbody", *body),
        id=id,
        class_="sortable",
    )
    region = element("div", grid, class_="scroll", role="region", tabindex="0", aria_label=caption)
    if not search:
        return region
    label = element("label", search, " ", element("input", type="search", data_table=id, autocomplete="off"))
    count = element("span", f"{len(body)} rows", class_="count", role="status")
    return join([element("div", label, count, class_="filter"), region])


def bar(before: float, after: float) -> Html:
    """A bar of what is left; only for the eye, as the numbers stand beside it."""
    share = after / before if before else 0.0
    return element("span", element("i", style=f"width:{100 * share:.1f}%"), class_="bar", aria_hidden="true")


def chart(kind: str, label: str, caption: str, alternative: Html, controls: Html | None = None) -> Html:
    """A place that the script draws a chart of `kind` into, and the same numbers as a table."""
    return element(
        "figure",
        controls or Html(""),
        element("div", class_="chart", data_chart=kind, role="img", aria_label=label),
        element("figcaption", caption),
        element("details", element("summary", "The numbers as a table"), alternative),
    )


def page(title: str, lead: object, sections: Sequence[Section], data: Mapping[str, Any], foot: str) -> str:
    """The whole file.  data: what the charts show, by kind; without any the libraries that draw are left out."""
    links = [element("li", element("a", section.title, href=f"#{section.id}")) for section in sections]
    parts = [
        element(
            "section",
            element("h2", section.title, id=f"{section.id}-title"),
            section.body,
            id=section.id,
            aria_labelledby=f"{section.id}-title",
        )
        for section in sections
    ]
    libraries = [f"<script>/*\n{_part('LICENSES.txt')}*/</script>", *(f"<script>{_part(name)}</script>" for name in LIBRARIES)]
    return Template(_part("report.html")).substitute(
        title=markup(title),
        style=_part("report.css"),
        lead=markup(lead),
        links=join(links).text,
        sections=join(parts, "\n").text,
        data=embedded(data),
        libraries="\n".join(libraries) if data else "",
        script=_part("report.js"),
        foot=markup(foot),
    )


def embedded(data: Mapping[str, Any]) -> str:
    """JSON that no text in it can end the script element of; what is not finite is null."""
    text = json.dumps(_finite(data), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value


def _part(name: str) -> str:
    return (files("onnxprune") / "page" / name).read_text(encoding="utf-8")

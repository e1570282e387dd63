"""README quotes no figure that benchmarks/results.md, which says how each is made, does not have."""

from __future__ import annotations

import re

from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "benchmarks" / "results.md").read_text(encoding="utf-8")
NUMBER = re.compile(r"(?<![\w.-])\d+(?: \d{3})*(?:\.\d+)?(?![\w-])")


def tables(text: str) -> dict[tuple[str, ...], list[tuple[str, ...]]]:
    """{the header: the rows} of each table."""
    found: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    rows: list[tuple[str, ...]] = []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            rows.append(tuple(cell.strip() for cell in line.strip("|").split("|")))
        elif rows:
            found[rows[0]] = rows[2:]
            rows = []
    return found


def test_tables_are_those_of_the_results() -> None:
    ours, theirs = tables(README), tables(RESULTS)
    assert len(ours) >= 5
    assert {header: theirs.get(header) for header in ours} == ours


def test_figures_between_the_tables_are_in_the_results_too() -> None:
    section = README.partition("## Measured")[2].partition("\n## ")[0]
    prose = "\n".join(line for line in section.splitlines() if not line.startswith("|"))
    prose = re.sub(r"`[^`]*`|\]\([^)]*\)", " ", prose)  # code and links
    quoted = set(NUMBER.findall(prose))
    assert len(quoted) > 5
    assert quoted <= set(NUMBER.findall(RESULTS))


def test_figures_of_the_first_command_and_of_the_limits() -> None:
    first = README.partition("It prints the widths")[2].partition("\n\n")[0]
    large = README.partition("a decoder of")[2].partition("\n")[0]
    assert first
    assert large
    assert {*NUMBER.findall(first), *NUMBER.findall(large)} <= set(NUMBER.findall(RESULTS))


def test_every_program_that_is_named_is_there() -> None:
    for name in set(re.findall(r"benchmarks/(\w+\.py)", README + RESULTS)):
        assert (ROOT / "benchmarks" / name).is_file(), name
    for target in re.findall(r"\]\(([^)#]+)\)", RESULTS):
        assert (ROOT / "benchmarks" / target).exists(), target

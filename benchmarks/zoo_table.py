"""A Markdown table, a line a family, of what `zoo_check.py --out FILE` found on a zoo of exported graphs.

python ../shared/tools/zoo_check.py --out results.json && python benchmarks/zoo_table.py ../shared/zoo/index.json results.json
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def line(name: str, rows: list[Row], ratio: float) -> str:
    """Graphs, right ones, refused ones, coverage, and how many meet the budget within 1.5 points."""
    right = [r for r in rows if r["state"] == "right"]
    covered = [r.get("coverage", 0) for r in rows]
    counted = [c for c in covered if c is not None] or [0]
    budget = sum(abs(1 - ratio - r.get("macs_left", 9)) <= 0.015 for r in right)
    wrong = sum(r["state"] == "wrong" for r in rows)
    refused = sum(r["state"] == "refused" for r in rows)
    seconds = statistics.median([r["prune_s"] for r in right] or [0])
    mean, high = statistics.fmean(counted), sum(c > 0.9 for c in counted)
    return f"| {name} | {len(rows)} | {len(right)} | {refused} | {wrong} | {mean:.3f} | {high} | {budget} | {seconds:.1f} |"


def exceptions(rows: list[Row]) -> list[str]:
    """A line for each graph that is not right, with what stopped it."""
    found = []
    for row in rows:
        if row["state"] != "right":
            error = row.get("error")
            text = error[0] if isinstance(error, list) and error else error
            found.append(f"- `{row['name']}` {row['state']} ({row.get('stage', '')}): {str(text)[:160]}")
    return found


def main() -> None:
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    index = json.loads(Path(sys.argv[1]).read_text())
    rows = [row for path in sys.argv[2:] for row in json.loads(Path(path).read_text())]
    families: dict[str, list[Row]] = {}
    for row in rows:
        families.setdefault(index[row["name"]]["family"], []).append(row)
    print("| family | graphs | right | refused | wrong | coverage, mean | coverage > 0.9 | MACs within 1.5 points | seconds, median |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for family, members in sorted(families.items()):
        print(line(family, members, 0.4))
    print(line("**all**", rows, 0.4))
    print()
    print("\n".join(exceptions(rows)))


if __name__ == "__main__":
    main()

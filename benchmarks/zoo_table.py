"""docs/zoo.md: what `zoo_check.py --out FILE` found on a zoo of exported graphs, by family, and every exception with its reason.

    python ../shared/tools/zoo_check.py --out results.json
    python benchmarks/zoo_table.py results.json --out docs/zoo.md

An exception is a graph that is not right, or one of whose channel axes less than half are reached; for those,
`onnxprune groups` is run again here and asked why each axis is fixed.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

Row = dict[str, Any]
STATES = ("right", "refused", "crashed", "wrong")
LOW = 0.5  # share of channel axes below which a graph is an exception
LIMIT = 300  # seconds for one graph
WORDS = {
    "graph input": "the model's own inputs",
    "graph output": "the model's own outputs",
    "a single unit": "all of the axis would have to go at once",
    "kernel axis": "the kernel, not channels",
}


def line(name: str, rows: list[Row], ratio: float) -> str:
    """Graphs by state, coverage, how many meet the budget within 1.5 points, and seconds."""
    right = [r for r in rows if r["state"] == "right"]
    states = " | ".join(str(sum(r["state"] == state for r in rows)) for state in STATES)
    counted = [r.get("coverage", 0) for r in rows if r.get("coverage", 0) is not None] or [0]
    budget = sum(abs(1 - ratio - r.get("macs_left", 9)) <= 0.015 for r in right)
    seconds = f"{statistics.median(r['prune_s'] for r in right):.1f}" if right else ""
    high = sum(c > 0.9 for c in counted)
    return f"| {name} | {len(rows)} | {states} | {statistics.fmean(counted):.3f} | {high} | {budget} | {seconds} |"


def fixed_axes(name: str) -> tuple[Counter[str], int]:
    """Why the channel axes that no group reaches are fixed: {reason: axes}, and how many channel axes there are."""
    import check
    import numpy as np
    import onnx
    import onnx.inliner
    import zoo

    proto = zoo.load(name)
    with tempfile.TemporaryDirectory() as folder:
        model, feeds, out = (Path(folder) / f for f in ("model.onnx", "feeds.npz", "groups.json"))
        onnx.save(proto, model)
        np.savez(feeds, **zoo.feeds(name))
        command = [sys.executable, "-m", "onnxprune", "groups", str(model), "--feeds", str(feeds), "--json", str(out), "--quiet"]
        try:
            subprocess.run(command, capture_output=True, timeout=LIMIT, check=False)
        except subprocess.TimeoutExpired:
            return Counter({f"over {LIMIT} s": 1}), 0
        content = json.loads(out.read_text()) if out.exists() else {"groups": [], "fixed": []}
    axes = check.channel_axes(onnx.inliner.inline_local_functions(proto) if proto.functions else proto)
    reached = {(m["tensor"], m["axis"]) for group in content["groups"] for m in group["members"]}
    reasons = {(f["tensor"], f["axis"]): f["reason"] for f in content["fixed"]}
    left = Counter(re.sub(r" '[^']*'", "", reasons.get(axis, "in no tensor that a rule reads")) for axis in axes - reached)
    return left, len(axes)


def exception(row: Row) -> str:
    """A line for a graph: what happened, and what stands in the way of the axes that are not reached."""
    error = row.get("error")
    text = str(error[0] if isinstance(error, list) and error else error).removeprefix("error: ").replace(f"{row['name']}.onnx: ", "")
    coverage = row.get("coverage", 0)
    said = f"- `{row['name']}`: {row['state']}"
    if row["state"] != "right":
        said += f" at `{row.get('stage', '')}`, {text[:200]}"
    left, count = fixed_axes(row["name"]) if coverage is not None and coverage < LOW else (Counter(), 0)
    if coverage is None or (coverage < LOW and not count):
        return said + "; " + (", ".join(left) or "no layer outside of functions and subgraphs has a constant weight to count")
    said += f"; {coverage:.0%} of its {f'{count} ' if count else ''}channel axes reached"
    named = [f"{n} {reason}" + (f" ({WORDS[reason]})" if reason in WORDS else "") for reason, n in left.most_common(4)]
    return said + ("; fixed: " + ", ".join(named) if named else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="what zoo_check.py --out wrote; of several rows of a graph, the last")
    parser.add_argument("--shared", type=Path, default=Path(__file__).resolve().parent.parent.parent / "shared", help="has zoo/ and tools/")
    parser.add_argument("--ratio", type=float, default=0.4, help="of zoo_check.py")
    parser.add_argument("--out", type=Path, help="standard output if not given")
    args = parser.parse_args()
    sys.path[:0] = [str(args.shared / "zoo"), str(args.shared / "tools")]
    import zoo

    index = zoo.index()
    rows = list({row["name"]: row for path in args.results for row in json.loads(path.read_text())}.values())
    families: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["name"]):
        families.setdefault(index[row["name"]]["family"], []).append(row)
    text = [
        "# The zoo, graph by graph",
        "",
        f"{len(rows)} graphs as exporters wrote them, with random weights, pruned at `--ratio {args.ratio} --of macs` and checked from",
        "outside: the outputs stay when the groups' units are permuted, a permuted model pruned of the same units gives the",
        "same outputs, and so does the original with zeros in place of the units where no mean, variance or softmax reads them.",
        "A graph is *right* if all three hold, *refused* if onnxprune says that nothing can go, *crashed* if it ends with another",
        "error, *wrong* if a check fails. Coverage is the share of channel axes (both sides of every constant layer weight) that a",
        "group reaches. Made by `benchmarks/zoo_table.py`.",
        "",
        f"| family | graphs | {' | '.join(STATES)} | coverage, mean | coverage > 0.9 | MACs within 1.5 points | seconds, median |",
        "| --- |" + " ---: |" * 9,
        *(line(family, members, args.ratio) for family, members in sorted(families.items())),
        line("**all**", rows, args.ratio),
        "",
        "## Exceptions",
        "",
        f"Every graph that is not right, or of whose channel axes less than {LOW:.0%} are reached, and what the rest is fixed by.",
    ]
    for family, members in sorted(families.items()):
        found = [row for row in members if row["state"] != "right" or (row.get("coverage") or 0) < LOW]
        text += ["", f"### {family}", ""] if found else []
        for row in found:
            text.append(exception(row))
            print(text[-1], file=sys.stderr, flush=True)
    if args.out:
        args.out.write_text("\n".join(text) + "\n")
    else:
        print("\n".join(text))


if __name__ == "__main__":
    main()

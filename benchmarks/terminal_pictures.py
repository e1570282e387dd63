"""The pictures of the terminal in docs/: what two commands print in windows of 100 and 60 characters, as SVG.

python benchmarks/terminal_pictures.py [--out docs]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import DEFAULT_TERMINAL_THEME
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = {
    "prune": "digits-conv1d.onnx --ratio 0.5 --calibration digits-conv1d.calibration.npz --eval digits-conv1d.eval.npz -o smaller.onnx",
    "inspect": "inspect digits-conv1d.onnx",
}
WIDTHS = {"": 100, "-narrow": 60}
# Rich's own picture takes its font from another host; this one takes the reader's
PICTURE = """<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: {char_height}px;
  line-height: {line_height}px; }}
.{unique_id}-title {{ font-size: 18px; font-weight: bold; font-family: sans-serif; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal"><rect x="0" y="0" width="{terminal_width}" height="{terminal_height}" /></clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


def picture(name: str, width: int) -> str:
    """What the command prints, with its colours, in a window of so many characters."""
    line = COMMANDS[name].split()
    environment = {**os.environ, "FORCE_COLOR": "1", "COLUMNS": str(width), "PYTHONPATH": str(ROOT), "ONNXPRUNE_CONFIG": ""}
    with tempfile.TemporaryDirectory() as folder:
        for path in (ROOT / "models").glob("digits-conv1d.*"):
            (Path(folder) / path.name).symlink_to(path)
        command = [sys.executable, "-m", "onnxprune", *line]
        made = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, env=environment)
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        console = Console(width=width, record=True, file=nowhere, force_terminal=True, highlight=False)
        console.print(Text("$ onnxprune " + " ".join(line), style="bold"))
        console.print(Text.from_ansi(made.stdout))
    return console.export_svg(title="onnxprune", theme=DEFAULT_TERMINAL_THEME, code_format=PICTURE, unique_id=f"onnxprune-{name}-{width}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    args = parser.parse_args()
    for name in COMMANDS:
        for ending, width in WIDTHS.items():
            target = args.out / f"terminal-{name}{ending}.svg"
            target.write_text("\n".join(text.rstrip() for text in picture(name, width).splitlines()) + "\n", encoding="utf-8")
            print(target)


if __name__ == "__main__":
    main()

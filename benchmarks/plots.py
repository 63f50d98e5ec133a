"""Pictures of the committed results: each provider's speed beside eager fp32, a panel for each number of rows.

    python benchmarks/plots.py [--results benchmarks/results] [--out docs/plots]

Drawn from the JSON rows alone; one SVG a device.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# what the eye should find, in the order of the bars; others stay in the tables
PROVIDERS = {
    "AMP bf16": "#bdbdbd",
    "compile": "#9e9e9e",
    "onnxruntime": "#8d6e63",
    "onnxruntime int8": "#6d4c41",
    "OpenVINO int8": "#a1887f",
    "rewardzip fused fp32": "#b2dfdb",
    "rewardzip int8": "#4db6ac",
    "rewardzip int8 x int8": "#00796b",
}
ROWS = (1, 1024, 65536)


def read(folder: Path, threads: str = "1") -> list[dict[str, Any]]:
    files = sorted(folder.glob("cpu-*.json")) or sorted(folder.glob("models*.json"))
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return [row for row in rows if row["op"] == "model" and row.get("threads", threads) == threads]


def ratios(rows: Iterable[dict[str, Any]]) -> dict[tuple[int, str, str], float]:
    """(rows, model, provider) to times faster than eager fp32."""
    p50 = {(row["rows"], row["model"], row["provider"]): row["p50"] for row in rows}
    return {
        (m, model, provider): p50[m, model, "fp32"] / taken
        for (m, model, provider), taken in p50.items()
        if (m, model, "fp32") in p50
    }


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    faster = ratios(rows)
    models = list(dict.fromkeys(row["model"] for row in rows))
    shown = [m for m in ROWS if any(key[0] == m for key in faster)]
    with plt.rc_context({"svg.hashsalt": "rewardzip", "font.size": 9, "font.family": "DejaVu Sans"}):
        figure, panels = plt.subplots(
            len(shown), 1, figsize=(8.5, 2.1 * len(shown)), squeeze=False, sharex=True, layout="constrained"
        )
        for panel, m in zip(panels[:, 0], shown, strict=True):
            present = [p for p in PROVIDERS if any((m, model, p) in faster for model in models)]
            width = 0.8 / len(present)
            for i, provider in enumerate(present):
                bars = [
                    (at + (i - (len(present) - 1) / 2) * width, faster[m, model, provider])
                    for at, model in enumerate(models)
                    if (m, model, provider) in faster
                ]
                where, height = zip(*bars, strict=True)
                panel.bar(where, [h - 1 for h in height], width, 1, color=PROVIDERS[provider], label=provider)
            panel.axhline(1, color="black", linewidth=0.8)
            panel.set_yscale("log", base=2)
            panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
            panel.set_title(f"{m:,} row{'s' if m > 1 else ''}", loc="left")
            panel.spines[["top", "right"]].set_visible(False)
        panels[-1, 0].set_xticks(range(len(models)), models, rotation=20, ha="right", rotation_mode="anchor")
        panels[0, 0].legend(ncols=len(PROVIDERS) // 2, frameon=False, loc="lower left", bbox_to_anchor=(0, 1.15))
        told = rows[0]
        source = f"{told['device']}, {told.get('threads', '?')} thread, torch {told['torch']}, {told['date']}"
        figure.supylabel("times faster than eager fp32")
        figure.supxlabel(source, fontsize=8)
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, metadata={"Date": None})
        plt.close(figure)


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, default=here / "results")
    parser.add_argument("--out", type=Path, default=here.parent / "docs" / "plots")
    options = parser.parse_args()
    for folder in sorted(path for path in options.results.iterdir() if path.is_dir()):
        if rows := read(folder):
            draw(rows, options.out / f"models-{folder.name}.svg")
            print(options.out / f"models-{folder.name}.svg")


if __name__ == "__main__":
    main()

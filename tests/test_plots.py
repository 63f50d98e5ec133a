"""The pictures in the docs are what the committed rows draw."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def plots():
    pytest.importorskip("matplotlib")
    return runpy.run_path(str(ROOT / "benchmarks" / "plots.py"))


def row(provider, p50, m=1):
    told = {"device": "here", "torch": "2", "date": "today", "threads": "1"}
    return {"op": "model", "model": "3-4-1", "rows": m, "provider": provider, "p50": p50, **told}


def test_ratios_are_to_fp32_of_the_same_cell(plots):
    rows = [row("fp32", 2.0), row("rewardzip int8", 0.5), row("rewardzip int8", 0.1, m=32)]
    assert plots["ratios"](rows) == {(1, "3-4-1", "fp32"): 1.0, (1, "3-4-1", "rewardzip int8"): 4.0}


def test_the_picture_in_the_docs_is_drawn_from_the_results(plots, tmp_path):
    folder = ROOT / "benchmarks" / "results" / "amd-epyc-zen5"
    rows = plots["read"](folder)
    assert {r["threads"] for r in rows} == {"1"}
    plots["draw"](rows, tmp_path / "picture.svg")
    text = (tmp_path / "picture.svg").read_text()
    assert "<dc:date>" not in text
    again = tmp_path / "again.svg"
    plots["draw"](rows, again)
    assert again.read_text() == text
    shown = (ROOT / "docs" / "plots" / "models-amd-epyc-zen5.svg").read_text()
    if drawn_by(shown) != drawn_by(text):
        pytest.skip(f"the picture is by {drawn_by(shown)}, here is {drawn_by(text)}")
    assert shown == text


def drawn_by(svg):
    return re.search(r"<dc:title>(Matplotlib v[^,]*)", svg)[1]


def test_another_number_draws_another_picture(plots, tmp_path):
    rows = plots["read"](ROOT / "benchmarks" / "results" / "amd-epyc-zen5")
    plots["draw"](rows, tmp_path / "one.svg")
    shown = next(i for i, row in enumerate(rows) if row["provider"] == "rewardzip int8")
    rows[shown] = rows[shown] | {"p50": 1.1 * rows[shown]["p50"]}
    plots["draw"](rows, tmp_path / "other.svg")
    assert (tmp_path / "one.svg").read_text() != (tmp_path / "other.svg").read_text()

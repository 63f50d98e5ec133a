"""The pictures in the docs are what the committed rows draw."""

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
    shown = ROOT / "docs" / "plots" / "models-amd-epyc-zen5.svg"
    # letters and bars are paths: as many as the rows ask for
    assert shown.read_text().count("<path") == text.count("<path")

"""The report as a page: all of it in one file, nothing fetched, readable in both colour schemes."""

import dataclasses
import re
import xml.etree.ElementTree as ElementTree

import pytest
import torch

import rewardzip as rz
from rewardzip.report import Candidate

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")


@pytest.fixture(scope="module")
def report():
    torch.manual_seed(0)
    model = rz.RewardMLP(3, 2)
    data = (torch.randn(300, 3), torch.randn(300, 2), torch.randn(300))
    options = {"gate": rz.Gate(), "batches": (1, 8), "seconds": 0.01, "progress": False}
    return rz.evaluate(model, rz.swap(model, rz.Int8()), data, **options)


def saved(report, tmp_path):
    report.save(tmp_path / "report.html")
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    return (tmp_path / "report.html").read_text("utf-8")


def test_the_page_stands_alone(report, tmp_path):
    page = saved(report, tmp_path)
    # names of namespaces are no addresses to fetch; pictures in the SVG are in it
    for address in re.findall(r"(?:src|href)\s*=\s*[\"']([^\"']+)", page):
        assert address.startswith(("#", "data:")), address
    assert not re.search(r"<(?:script|link|iframe|img)\b|@import|url\((?!#)", page)
    assert page.count("<svg") == 4
    for svg in re.findall(r"<svg.*?</svg>", page, re.S):
        ElementTree.fromstring(svg)
    assert "currentColor" in page, "text in plots takes the page's colour"
    assert "#010203" not in page
    assert len(page) < 300_000


def test_the_page_says_what_the_table_says(report, tmp_path):
    page = saved(report, tmp_path)
    assert "Passed the gate" in page
    for sheet in report.sheets():
        for cell in (c for row in sheet.rows for c in row):
            assert cell.replace("'", "&#39;") in page, cell


def test_a_failed_model_says_why(report, tmp_path):
    failed = dataclasses.replace(report, gate=rz.Gate(agreement=1))
    page = saved(failed, tmp_path)
    assert "Failed" in page
    assert "pair agreement is" in page


def test_broken_models_have_a_page_too(tmp_path):
    model, broken = rz.RewardMLP(3, 2), rz.RewardMLP(3, 2)
    broken.register_forward_hook(lambda module, args, output: output * torch.nan)
    data = torch.randn(300, 3), torch.randn(300, 2)
    page = saved(rz.evaluate(model, broken, data, batches=(1,), seconds=0.01, progress=False), tmp_path)
    assert "inf or NaN for 300 of 300 rows" in page
    assert "<svg" not in page


def test_a_search_shows_its_candidates(report, tmp_path):
    front = (
        Candidate("original", 1, 1, 1, True),
        Candidate("<b>Distil</b>", 13, 20, 0.992, True, chosen=True),
        Candidate("too much", 30, 25, 0.9, False),
    )
    page = saved(dataclasses.replace(report, front=front, notes=("3 < 4 tried",)), tmp_path)
    assert "13x smaller, 20x faster" in page
    assert "<b>Distil" not in page, "a name is text and no markup"
    assert "3 &lt; 4 tried" in page


def test_a_long_recipe_is_in_the_notes_and_not_across_the_picture(report, tmp_path):
    recipe = "Prune('neurons', amount=0.3) + FineTune() + Quantize(5)"
    front = (Candidate("original", 1, 1, 1, True), Candidate(recipe, 13, 20, 0.992, True, chosen=True))
    page = saved(dataclasses.replace(report, front=front), tmp_path)
    assert "chosen" in page
    assert "Prune" not in page


def test_nothing_is_left_where_there_is_no_folder(report, tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        report.save(tmp_path / "missing" / "report.html")
    assert list(tmp_path.iterdir()) == []

"""The page as text: nothing in it is believed to be markup, nothing is fetched, and it stays small."""

import json
import re
from html.parser import HTMLParser

import pytest

from moemerge.report import html as page
from moemerge.report.findings import findings
from moemerge.report.html import render, write_report
from moemerge.report.reading import open_report
from tests.reports import write_reports, write_similarity

HOSTILE = '<script>alert("x")</script><img src=x onerror=alert(1)>&amp;'


class Markup(HTMLParser):
    """Elements with their attributes, and the text outside of scripts."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text, self.inside = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.inside = [tag] if tag in ("script", "style") else []

    def handle_endtag(self, tag):
        self.inside = []

    def handle_data(self, data):
        if not self.inside:
            self.text.append(data)


@pytest.fixture
def without_plotly(monkeypatch):
    monkeypatch.setattr(page, "_plotly", lambda: "")


def data_of(text):
    return json.loads(
        re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.DOTALL)[1]
    )


def test_hostile_names_stay_text(tmp_path, without_plotly):
    folder = write_similarity(tmp_path / HOSTILE.replace("/", "_"), [HOSTILE, "b"], 4, 2)
    text = render(open_report(folder))
    found = Markup(text)
    kinds = [tag for tag, _ in found.elements]
    assert kinds.count("script") == 2
    assert all(attributes.get("src", "data:").startswith("data:") for _, attributes in found.elements)
    assert not any(name.startswith("on") for _, attributes in found.elements for name in attributes)
    assert HOSTILE in "".join(found.text)
    assert data_of(text)["viewer"]["names"][0] == f"{HOSTILE}:0"


def test_hostile_sources_of_a_bundle_stay_text(tmp_path, without_plotly):
    text = render(open_report(write_reports(tmp_path / "x.moe", source=HOSTILE)))
    assert "<script>alert" not in text
    assert HOSTILE in "".join(Markup(text).text)


def test_policy_allows_these_scripts_and_nothing_else(tmp_path):
    text = render(open_report(write_reports(tmp_path / "x.moe")))
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)[1]
    assert policy.startswith("default-src &#39;none&#39;")
    assert "unsafe-inline" not in policy.split("script-src")[1]


def test_everything_is_there_without_scripts(tmp_path, without_plotly):
    report = open_report(write_reports(tmp_path / "x.moe"))
    text = render(report)
    shown = "".join(Markup(text).text)
    for finding in findings(report):
        assert finding.text in shown
    assert text.count('class="chart"') == 7
    assert text.count('class="grid"') == 5
    assert text.count("data:image/png") == 5 + len(report.layers)
    for title in ("Layers", "Clusters", "Worst slots", "Variants", "Routers", "Error against bytes"):
        assert title in shown


def test_finding_names_the_layer_that_shares_best(tmp_path):
    told = [finding.text for finding in findings(open_report(write_reports(tmp_path / "x.moe")))]
    assert any(text.startswith("Layer 0 shares best") for text in told)
    assert any("siblings are closest in layer 0" in text for text in told)
    assert any("98.0% is kept on average" in text for text in told)


@pytest.mark.parametrize("variants", [1, 2, 9])
def test_any_number_of_variants_makes_a_page(tmp_path, variants, without_plotly):
    folder = write_reports(tmp_path / "x.moe", variants=variants, slots=2, layers=1)
    assert "How experts are kept" in render(open_report(folder))


def test_plan_and_similarity_alone_make_pages(tmp_path, without_plotly):
    folder = write_reports(tmp_path / "x.moe")
    for path in (folder / "reports" / "plan.json", folder / "reports"):
        write_report(path, tmp_path / "page.html")
        assert "What these numbers are evidence of" in (tmp_path / "page.html").read_text()


def test_same_reports_give_the_same_bytes(tmp_path):
    folder = write_reports(tmp_path / "x.moe")
    assert render(open_report(folder)) == render(open_report(folder))


def test_page_of_four_variants_of_eight_experts_in_32_layers_is_small(tmp_path):
    folder = write_reports(tmp_path / "x.moe", variants=4, slots=8, layers=32)
    write_report(folder, tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < 8_000_000

"""The documentation as a site: built without a warning, complete, and asking nothing of other machines."""

import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from moemerge import __all__ as public_names
from moemerge.cli.app import app

ROOT = Path(__file__).parents[2]
COMMANDS = [command.name for command in app.registered_commands]
LOADING = {"script": "src", "img": "src", "iframe": "src", "link": "href", "source": "src", "video": "src"}
LINKS_THAT_LOAD_NOTHING = {"canonical", "next", "prev"}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built pages. `mkdocs.yml` is strict: pages outside the navigation and dead links are errors."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", folder],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return folder


class Page(HTMLParser):
    """What a page loads, and its text."""

    def __init__(self, path):
        super().__init__()
        self.loads, self.text = [], ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if tag in LOADING and values.get("rel") not in LINKS_THAT_LOAD_NOTHING:
            self.loads.append(values.get(LOADING[tag]) or "")

    def handle_data(self, data):
        self.text += data


def test_pages_load_nothing_from_elsewhere(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 30
    for path in pages:
        assert not [url for url in Page(path).loads if "//" in url], path
    for sheet in site.rglob("*.css"):
        assert "url(http" not in sheet.read_text(encoding="utf-8"), sheet


def test_reference_has_every_command_with_its_options_and_example(site):
    text = Page(site / "commands.html").text
    for command in app.registered_commands:
        section = text.split(f"moemerge {command.name}¶")[1].split("¶")[0]
        assert "--json" in section, command.name
        assert f"$ moemerge {command.name}" in section.split("Usage")[0], command.name


def test_reference_has_every_public_name(site):
    text = Page(site / "python.html").text
    for name in public_names:
        assert name.startswith("_") or name in text, name

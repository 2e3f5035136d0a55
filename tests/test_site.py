"""The site is built from docs/ without a warning, and what leads from page to page is there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOORS = ["README.md", "CHANGELOG.md", ".github/SECURITY.md"]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built: a dead link, a page that the menu lacks, a name that is not in the code are errors."""
    out = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", out],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    return out


def test_every_page_is_a_page_of_the_site(site):
    pages = {p.relative_to(ROOT / "docs").with_suffix("") for p in (ROOT / "docs").rglob("*.md")}
    assert len(pages) > 30
    for page in pages:
        folder = page.parent if page.name in ("README", "index") else page
        assert (site / folder / "index.html").is_file(), page


def test_the_reference_shows_what_the_package_gives(site):
    import llmq

    shown = (site / "api/index.html").read_text()
    for name in set(llmq.__all__) - {"__version__"}:
        assert re.search(rf'id="llmq\.[\w.]+\.{name}"', shown), name


def test_the_site_asks_nobody_for_anything(site):
    html = (site / "index.html").read_text()
    assert not re.findall(r'(?:src|href)="(?:https?:)?//(?!www\.w3\.org)[^"]*"', html)


@pytest.mark.parametrize("door", DOORS)
def test_links_of_the_doors_lead_somewhere(door):
    links = re.findall(r"\]\(([^)#]+)", (ROOT / door).read_text())
    missing = [to for to in links if "//" not in to and not (ROOT / door).parent.joinpath(to).exists()]
    assert not missing and (links or door != "README.md")


def test_one_version_everywhere():
    import llmq

    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert llmq.__version__ == version == yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text()

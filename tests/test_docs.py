"""The documentation: the site builds without a warning, and every link leads somewhere."""

import json
import re
import urllib.request
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from fixtures.documentation import PAGES, page_name
from fixtures.paths import ROOT


CODE = re.compile(r"^(`{3,})[^\n]*\n.*?^\1$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(<?([^)>\s]+)>?\)|^ {0,3}\[[^\]]+\]: (\S+)|<(https?://[^>\s]+)>", re.MULTILINE)


def links(page: Path) -> list[str]:
    text = CODE.sub("", page.read_text("utf-8"))
    return [next(filter(None, match.groups())) for match in LINK.finditer(text)]


def anchors(page: Path) -> set[str]:
    """Return the ids that GitHub and the site give to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", CODE.sub("", page.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


EXTERNAL = sorted({link for page in PAGES for link in links(page) if urlsplit(link).scheme})


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_within_the_repository_lead_somewhere(page):
    broken = []
    for link in links(page):
        address = urlsplit(link)
        if not address.scheme:
            target = (page.parent / unquote(address.path)).resolve() if address.path else page
            if not target.exists() or (address.fragment and unquote(address.fragment) not in anchors(target)):
                broken.append(link)
    assert not broken


def test_links_to_other_sites_are_complete():
    wrong = [link for link in EXTERNAL if not re.fullmatch(r"https?://[\w.-]+\.[a-z]{2,}(/[\w./~%+#?=&()-]*)?", link)]
    assert not wrong


@pytest.mark.network
@pytest.mark.parametrize("link", EXTERNAL)
def test_links_to_other_sites_resolve(link):
    request = urllib.request.Request(link, headers={"User-Agent": "Mozilla/5.0"})
    with urllib.request.urlopen(request, timeout=30) as response:
        assert response.status == 200


def test_the_site_builds_without_a_warning(tmp_path, capsys):
    pytest.importorskip("sphinx")
    from sphinx.cmd.build import main

    options = ["--fail-on-warning", "--quiet", "-D", "nb_execution_mode=off"]
    status = main([*options, str(ROOT / "docs"), str(tmp_path)])
    assert status == 0, capsys.readouterr().err
    assert (tmp_path / "index.html").is_file()
    index = (tmp_path / "searchindex.js").read_text("utf-8")
    assert json.dumps("掩码") + ":" in index  # Chinese words are found

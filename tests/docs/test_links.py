"""Links between the documents lead somewhere: to a file that exists, to a heading that is there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"(?<!!)\[[^\]]+\]\(([^)\s]+)\)")


def anchors(text):
    """Return the anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_within_the_repository_resolve(document):
    for target in LINK.findall(document.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        found = (document.parent / path).resolve() if path else document
        assert found.exists(), f"{document.name} links to {target}, which is not there"
        if anchor:
            assert anchor in anchors(found.read_text(encoding="utf-8")), f"{document.name}: no heading {target}"


def linked(page):
    """Return the files that a document links to."""
    links = LINK.findall(page.read_text(encoding="utf-8"))
    return {(page.parent / link.partition("#")[0]).resolve() for link in links if "://" not in link}


def test_the_readme_leads_to_every_document(document):
    readme = ROOT / "README.md"
    pages = {page for page in linked(readme) if page.suffix == ".md"}
    reached = pages.union({readme}, *(linked(page) for page in pages))
    assert document in reached, f"nothing leads to {document}"

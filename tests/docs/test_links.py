"""Links between the documents lead somewhere: to a file that exists, to a heading that is there."""

import re

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


def test_the_readme_leads_to_every_document(document):
    root = next(
        parent
        for parent in document.parents
        if (parent / "pyproject.toml").exists() and (parent / "README.md").exists() and (parent / "tests").exists()
    )
    targets = {(root / link).resolve() for link in LINK.findall((root / "README.md").read_text(encoding="utf-8"))}
    pages = {
        (page.parent / link).resolve()
        for page in targets
        if page.suffix == ".md" and page.is_file()
        for link in LINK.findall(page.read_text(encoding="utf-8"))
    }
    assert document in targets | pages | {root / "README.md"}, f"nothing leads to {document}"

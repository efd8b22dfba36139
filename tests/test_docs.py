"""Links of README, docs and examples lead somewhere; the site has all modules and loads nothing from other hosts."""

from __future__ import annotations

import functools
import importlib.util
import re
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
TOP = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")]
TEXTS = [*TOP, *sorted(ROOT.glob("examples/*.md")), *DOCS]


@functools.cache
def site() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_site", ROOT / "docs" / "site.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prose(path: Path) -> str:
    """The text of a page without blocks and spans of code."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", lambda code: code.group().strip("`") if "](" not in code.group() else "", text)


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site spell them."""
    titles = re.findall(r"^#+ +(.*?) *$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_headings_that_are_there(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        link = urlsplit(target)
        if link.scheme:
            assert link.scheme == "https", target
            continue
        file = (path.parent / unquote(link.path)).resolve() if link.path else path
        assert file.exists() and ROOT in file.parents, f"{path.name}: {target}"
        if link.fragment:
            assert link.fragment in anchors(file), f"{path.name}: {target}"


def test_a_heading_s_anchor_is_spelt_as_on_the_web(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Is it right? `parity`\n```\n# no heading\n```\n## Which GPUs, and how many\n", encoding="utf-8")
    assert anchors(page) == {"is-it-right-parity", "which-gpus-and-how-many"}


def test_the_navigation_names_every_page() -> None:
    tree = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), yaml.BaseLoader)
    named: list[str] = []

    def walk(part: object) -> None:
        if isinstance(part, str):
            named.append(part)
        for one in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
            walk(one)

    walk(tree["nav"])
    assert sorted(named) == sorted([*(path.name for path in DOCS), *site().TOP_PAGES.values()])


def test_the_api_has_every_module_of_every_source_root() -> None:
    documented = {f"{name}.{module}" for name, modules in site().packages().items() for module in modules}
    packages = set(site().packages())
    for root in ("exporter", "plugins", "runtime"):
        for path in (ROOT / root).glob("seekforge/*/**/*.py"):
            name = ".".join(path.relative_to(ROOT / root).with_suffix("").parts)
            if path.stem == "__init__":
                assert name.removesuffix(".__init__") in packages
            elif not path.stem.startswith("_"):
                assert name in documented


def test_the_page_of_public_names_has_what_the_package_exports() -> None:
    import seekforge

    page = site()._public_page()
    for name in seekforge.__all__:
        assert name.startswith("__") or re.search(rf"^::: seekforge\.\S+\.{name}$", page, re.MULTILINE), name


@pytest.mark.parametrize(
    ("text", "loads"),
    [
        ('<script src="https://cdn.example/x.js"></script>', True),
        ('<link rel="stylesheet" href="//fonts.example/css">', True),
        ('<link rel="preconnect" href="https://fonts.example">', True),
        ('<img src="https://pictures.example/a.png">', True),
        ('<p style="background: url(https://pictures.example/b.png)">', True),
        ('<a href="https://elsewhere.example">a link that is clicked</a>', False),
        ('<link rel="canonical" href="https://own.example/page.html">', False),
        ('<script src="assets/x.js"></script><img src="data:image/png;base64,AA==">', False),
    ],
)
def test_what_a_page_loads_from_other_hosts_is_found(tmp_path: Path, text: str, loads: bool) -> None:
    (tmp_path / "page.html").write_text(f"<html>{text}</html>", encoding="utf-8")
    assert bool(list(site().foreign(tmp_path))) == loads


def test_what_a_style_loads_from_other_hosts_is_found(tmp_path: Path) -> None:
    (tmp_path / "own.css").write_text("@font-face{src:url(fonts/a.woff2)}", encoding="utf-8")
    assert list(site().foreign(tmp_path)) == []
    (tmp_path / "foreign.css").write_text('@import "https://fonts.example/css"; b{src:url("//c.example/d")}')
    assert len(list(site().foreign(tmp_path))) == 2

"""What `make docs` adds to the pages of this folder: the API from docstrings, and files that pages link to.

Nothing here lists modules. Every package of the three source roots becomes a page with its modules, found when the site
is built, so no page goes stale when a module moves. Code is read and never imported: the docs need no torch.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:  # mkdocs is there when it calls this; tests of the rest do without
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "seekforge"
#: A source root is a folder of the repository that holds a part of the package.
SOURCE_ROOTS = sorted(path.parent for path in ROOT.glob(f"*/{PACKAGE}"))
PUBLIC = "names"
#: Markdown of the repository's top that is a page of the site, and what the page is called.
TOP_PAGES = {"CHANGELOG.md": "changelog.md", "examples/README.md": "examples.md", "CONTRIBUTING.md": "contributing.md"}
_TOP_PLACES = {ROOT / source: target for source, target in TOP_PAGES.items()}
_LINK = re.compile(r"(?<=\]\()([^)\s#]+)(?=[)#])")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the pages of the API to the navigation."""
    assert config.nav is not None
    config.nav.append({"API": [{"Public names": "api/index.md"}, *({name: _page(name)} for name in packages())]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add pages that no file of this folder holds."""
    from mkdocs.structure.files import File

    for source, target in TOP_PAGES.items():
        files.append(File.generated(config, target, content=_relinked(ROOT / source)))
    files.append(File.generated(config, "api/index.md", content=_public_page()))
    for name, modules in packages().items():
        files.append(File.generated(config, _page(name), content=_package_page(name, modules)))
    sources = [*Path(config.docs_dir).glob("*.md"), *(ROOT / source for source in TOP_PAGES)]
    for path in sorted({path for source in sources for path in _outside(source)}):
        files.append(File.generated(config, f"repository/{path.relative_to(ROOT).as_posix()}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    """Turn links to files outside of this folder into links to the site's copies of them."""
    source = page.file.abs_src_path
    return _relinked(Path(source), markdown) if source else markdown


def on_post_build(config: MkDocsConfig) -> None:
    """Refuse a site that would ask another host for anything.

    Raises:
        PluginError: a page loads a script, a style, a font or an image from elsewhere.
    """
    from mkdocs.exceptions import PluginError

    found = list(foreign(Path(config.site_dir)))
    if found:
        raise PluginError("the site loads from other hosts: " + "; ".join(found[:10]))


def packages() -> dict[str, list[str]]:
    """Return every package under the source roots -> its modules that are for others, by dotted names."""
    found: dict[str, list[str]] = {}
    for root in SOURCE_ROOTS:
        for init in sorted(root.glob(f"{PACKAGE}/*/**/__init__.py")):
            names = [path.stem for path in sorted(init.parent.glob("*.py")) if not path.stem.startswith("_")]
            found[".".join(init.parent.relative_to(root).parts)] = names
    return found


def foreign(site: Path) -> Iterator[str]:
    """Yield what pages and styles of a built site load from other hosts."""
    for path in sorted(site.rglob("*.html")):
        parser = _Loads()
        parser.feed(path.read_text(encoding="utf-8"))
        yield from (f"{path.relative_to(site)}: {url}" for url in parser.urls if urlsplit(url).netloc)
    for path in sorted(site.rglob("*.css")):
        for url in re.findall(
            r"(?:url\(|@import)\s*[\"']?((?:https?:)?//[^\"')\s]+)", path.read_text(encoding="utf-8")
        ):
            yield f"{path.relative_to(site)}: {url}"


class _Loads(HTMLParser):
    """Collects addresses that a browser fetches by itself; a link that somebody clicks is none."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        names = ("src", "srcset", "poster", "data") if tag != "link" else ()
        if tag == "link" and given.get("rel") != "canonical":
            names = ("href",)
        self.urls += [value for name in names if (value := given.get(name))]
        self.urls += re.findall(r"url\([\"']?((?:https?:)?//[^\"')]+)", given.get("style") or "")


def _page(name: str) -> str:
    return f"api/{name.removeprefix(PACKAGE + '.')}.md"


def _public_page() -> str:
    module = next(
        root / PACKAGE / f"{PUBLIC}.py" for root in SOURCE_ROOTS if (root / PACKAGE / f"{PUBLIC}.py").is_file()
    )
    tree = ast.parse(module.read_text(encoding="utf-8"))
    homes = {
        alias.name: f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(f"{PACKAGE}.")
        for alias in node.names
    }
    lines = [
        "# Public names", "",
        f"These are imported from `{PACKAGE}` itself and keep their names; other pages show where things live.",
    ]  # fmt: skip
    for name in sorted(homes, key=str.lower):
        lines += ["", f"::: {homes[name]}", "    options: { show_root_full_path: false, inherited_members: true }"]
    return "\n".join(lines) + "\n"


def _package_page(name: str, modules: list[str]) -> str:
    lines = [f"# {name}", "", f"::: {name}", "    options: { members: false, show_root_heading: false }"]
    for module in modules:
        lines += ["", f"::: {name}.{module}"]
    return "\n".join(lines) + "\n"


def _outside(source: Path) -> Iterator[Path]:
    """Yield files of the repository that a text links to and that are no pages."""
    for target in _LINK.findall(source.read_text(encoding="utf-8")):
        path = _linked(source, target)
        if path is not None and ROOT / "docs" not in path.parents and path not in _TOP_PLACES:
            yield path


def _relinked(source: Path, markdown: str | None = None) -> str:
    """Return a text (by default the whole file) with its links as they are among the site's pages."""

    def link(match: re.Match[str]) -> str:
        path = _linked(source, match[1])
        if path is None:
            return match[1]
        if ROOT / "docs" in path.parents:
            return path.relative_to(ROOT / "docs").as_posix()
        return _TOP_PLACES.get(path) or f"repository/{path.relative_to(ROOT).as_posix()}"

    return _LINK.sub(link, source.read_text(encoding="utf-8") if markdown is None else markdown)


def _linked(source: Path, target: str) -> Path | None:
    """Return the file of the repository that a link leads to; None where it leads elsewhere."""
    path = (source.parent / target).resolve()
    return path if not urlsplit(target).scheme and path.is_file() and ROOT in path.parents else None

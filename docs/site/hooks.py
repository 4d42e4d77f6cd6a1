"""Hooks of the documentation site: pages that are kept outside docs/, and links to files that are not pages."""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
OUTSIDE = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Pages at the root of the repository, where people look for them, and their place in the site."""
LINK = re.compile(r"\[(?P<text>[^\]\n]*(?:\n[^\]\n]*)?)\]\((?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")
log = get_plugin_logger("links")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages of the root to the site."""
    for name, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links to source files into their names; a link to a file that is not in the repository is a warning."""
    source = page.file.src_uri
    original = next((name for name, place in OUTSIDE.items() if place == source), f"docs/{source}")

    def resolved(link: re.Match[str]) -> str:
        target, anchor = link["target"], link["anchor"] or ""
        if "://" in target or target.startswith("mailto:"):
            return link[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(original), target))
        if not (ROOT / path).exists():
            log.warning("%s links to %s, which does not exist", original, target)
        if path in OUTSIDE or path.startswith("docs/"):
            place = OUTSIDE.get(path, path.removeprefix("docs/"))
            return f"[{link['text']}]({posixpath.relpath(place, posixpath.dirname(source) or '.')}{anchor})"
        text = link["text"].strip("`")
        return f"`{path}`" if text in path else f"{text} (`{path}`)"

    return LINK.sub(resolved, markdown)

"""How Sphinx makes these pages: ``make docs``. They are plain Markdown, and read as such in the repository too."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.transforms import SphinxTransform

DOCS = Path(__file__).parent
LINKS = (addnodes.download_reference, addnodes.pending_xref)

project = "moetier"
author = "The moetier developers"
project_copyright = f"2026, {author}"
release = importlib.metadata.version("moetier")

extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}

html_theme = "furo"
html_title = f"moetier {release}"
html_show_sphinx = False
highlight_language = "text"  # of blocks that say no language
html_copy_source = False

myst_heading_anchors = 3  # page.md#a-heading, with the anchors that a git forge gives it
myst_enable_extensions = ["strikethrough", "deflist"]


class PathsOfTheRepository(SphinxTransform):
    """A link to what is in the repository and not beneath docs/ becomes its path in brackets: on a git forge it leads
    there, and no address of one is known here. It has to exist."""

    default_priority = 5  # before anybody looks for what is linked

    def apply(self) -> None:
        page = Path(self.env.doc2path(self.env.docname))
        for link in [*self.document.findall(lambda node: isinstance(node, LINKS))]:
            # MyST has taken the suffix off what looks to it like a page
            name = link["reftarget"].partition("#")[0] + (".md" if link["refdomain"] == "doc" else "")
            target = (page.parent / name).resolve()
            if target.exists() and not target.is_relative_to(DOCS):
                path = nodes.literal("", str(target.relative_to(DOCS.parent)))
                named = link.astext() in (path.astext(), link["reftarget"])
                link.replace_self([path] if named else [*link.children, nodes.Text(" ("), path, nodes.Text(")")])


def setup(app: object) -> None:
    app.add_transform(PathsOfTheRepository)  # type: ignore[attr-defined]

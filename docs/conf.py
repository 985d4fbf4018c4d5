"""The documentation as a site: ./launch/docs.sh builds it into site/."""

import re

import sphinx.application

project = "recalign_jax"
html_title = project
extensions = ["myst_parser"]
myst_heading_anchors = 3  # as code hosts make them, so that links work there as well
highlight_language = "none"
html_theme = "furo"
html_copy_source = False
html_show_copyright = False
html_show_sphinx = False


def add_navigation(app: sphinx.application.Sphinx, page: str, source: list[str]) -> None:
    """Makes the site's navigation of the lists of index.md, which a reader on a code host sees as they are."""
    if page == "index":
        for section in re.split(r"^## ", source[0], flags=re.MULTILINE)[1:]:
            pages = re.findall(r"^- \[(.+?)\]\((\w+)\.md\)", section, flags=re.MULTILINE)
            tree = "\n".join(f"{title} <{name}>" for title, name in pages)
            source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {section.splitlines()[0]}\n\n{tree}\n```\n"


def setup(app: sphinx.application.Sphinx) -> None:
    app.connect("source-read", add_navigation)

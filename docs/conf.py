"""The documents as a site: `make site`. Its root is the repository, so links lead where they lead on GitHub."""

project = "NutePrune"
extensions = ["myst_parser"]
root_doc = "docs/index"
include_patterns = ["*.md", "docs/*.md", "docs/experiments/*.md", "kernels/*.md", "slurm/*.md"]
html_theme = "furo"
html_title = project
html_copy_source = False
myst_heading_anchors = 4

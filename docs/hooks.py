"""Pages link to files of the repository; the site takes pictures along and shows the path of everything else."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = re.compile(r"(!?)\[([^\]]*)\]\(\.\./([^)#\s]+)\)")
PICTURES = "benchmarks/results"


def on_files(files: Files, config: Any) -> Files:
    """Add the pictures of benchmarks/results, which documents show from beside docs/."""
    for path in sorted((ROOT / PICTURES).glob("*.png")):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """A picture's link leads into the site; any other file of the repository is named by its path."""

    def inside(match: re.Match[str]) -> str:
        is_picture, text, target = match.groups()
        assert (ROOT / target).exists(), f"{page.file.src_uri} links to {target}, which does not exist"
        if is_picture:
            return f"![{text}](results/{posixpath.basename(target)})"
        return f"{text} (`{target}`)"

    return OUTSIDE.sub(inside, markdown)

#!/usr/bin/env python3
"""Fetch English text and code, with free licences, for `data=debian`.

    scripts/fetch_texts.py FOLDER

writes `essays.jsonl`, `handbooks.jsonl`, `manuals.jsonl` and `code.jsonl`, a file a row, and
`SOURCES.md` with packages, versions and licences. Texts are those of Debian packages, code is this
Python's library. `apt-get` and `dpkg-deb` of Debian or Ubuntu are needed, root is not.
"""

import argparse
import gzip
import json
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from platform import python_version
from typing import NamedTuple

LEAST_CHARACTERS = 500
"""Shorter files are tables of contents and the like."""
BLOCKS = frozenset(
    {"p", "div", "section", "article", "li", "dt", "dd", "tr", "table", "ul", "ol", "dl", "pre"}
    | {"blockquote", "br", "h1", "h2", "h3", "h4", "h5", "h6"}
)
"""Elements of HTML that begin and end a line."""
LEFT_OUT = frozenset({"head", "script", "style", "nav", "header", "footer"})
LINKS = frozenset({"Prev", "Next", "Up", "Home", "Download the ebook"})
"""Lines of DocBook's pages that are links."""


class Source(NamedTuple):
    """Texts of one Debian package.

    Attributes:
        kind: Stem of the file that they go to.
        package: Name of the package, as a pattern of which the newest is taken.
        files: Pattern of the files below its root.
        licence: Licence by the package's copyright file.
    """

    kind: str
    package: str
    files: str
    licence: str


SOURCES = (
    Source("essays", "anarchism", "usr/share/doc/anarchism/markdown/*.md.gz", "GPL-2+"),
    Source(
        "handbooks",
        "debian-handbook",
        "usr/share/doc/debian-handbook/html/en-US/*.html",
        "GPL-2+ or CC-BY-SA-3.0",
    ),
    Source("handbooks", "harden-doc", "usr/share/doc/harden-doc/html/en-US/*.html", "GPL-2"),
    Source("handbooks", "debian-reference-en", "usr/share/debian-reference/*.en.html", "GPL-2+"),
    Source("manuals", "python3.[0-9]+-doc", "usr/share/doc/python3*/html/_sources/**/*.txt", "PSF"),
    Source("manuals", "git-doc", "usr/share/doc/git-doc/**/*.txt", "GPL-2"),
)


class Text(HTMLParser):
    """Plain text of a page of HTML, a line a block."""

    def __init__(self) -> None:
        super().__init__()
        self.lines = [""]
        self._left_out, self._verbatim = 0, 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._step(tag, 1)

    def handle_endtag(self, tag: str) -> None:
        self._step(tag, -1)

    def _step(self, tag: str, change: int) -> None:
        self._left_out += change * (tag in LEFT_OUT)
        self._verbatim += change * (tag == "pre")
        if tag in BLOCKS and self.lines[-1]:
            self.lines.append("")

    def handle_data(self, data: str) -> None:
        if self._left_out:
            return
        if self._verbatim:
            first, *more = data.split("\n")
            self.lines[-1] += first
            self.lines += more
        else:
            text = re.sub(r"\s+", " ", data)
            self.lines[-1] += text if self.lines[-1] else text.lstrip()


def plain_text(page: str) -> str:
    """Return the text of a page of HTML."""
    parser = Text()
    parser.feed(page)
    lines = (line.rstrip() for line in parser.lines)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(line for line in lines if line not in LINKS))


def read(path: Path) -> str:
    """Read a text file, which may be compressed or HTML."""
    data = path.read_bytes()
    if path.suffix == ".gz":
        data = gzip.decompress(data)
    text = data.decode("utf-8", errors="replace")
    return plain_text(text) if path.suffix == ".html" else text


def newest(pattern: str) -> str:
    """Return the name of the newest package whose name a pattern matches."""
    names = run("apt-cache", "pkgnames").split()
    found = [name for name in names if re.fullmatch(pattern, name)]
    if not found:
        sys.exit(f"{pattern}: no such Debian package; run `apt-get update` first")
    return max(found, key=lambda name: [int(n) for n in re.findall(r"\d+", name)])


def run(*command: str, folder: str | None = None) -> str:
    """Run a program and return what it prints; its absence or failure ends the script."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        sys.exit(f"{command[0]}: no such program; expected Debian or Ubuntu")
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def package_texts(source: Source, package: str, work: str) -> Iterator[tuple[str, str]]:
    """Fetch a package and read its texts, each with its path in the package."""
    root = Path(work, package)
    root.mkdir()
    run("apt-get", "download", "-q", package, folder=str(root))
    [archive] = root.glob("*.deb")
    run("dpkg-deb", "-x", str(archive), str(root))
    for path in sorted({path.resolve() for path in root.resolve().glob(source.files)}):
        yield str(path.relative_to(root.resolve())), read(path)


def library_texts() -> Iterator[tuple[str, str]]:
    """Read the sources of Python's library but for tests, each with its path in the library."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        inside = path.relative_to(library)
        if not {"site-packages", "test", "tests", "idlelib", "lib2to3"} & set(inside.parts):
            yield str(inside), path.read_text("utf-8", errors="replace")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="to write to; must not exist")
    folder = parser.parse_args().folder
    if folder.exists():
        parser.error(f"{folder}: exists")
    rows: dict[str, list[dict[str, str]]] = {}
    about = ["# Sources", "", "| File | Source | Version | Licence |", "|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as work:
        for source in SOURCES:
            package = newest(source.package)
            found = [
                {"text": text, "source": f"{package}: {path}"}
                for path, text in package_texts(source, package, work)
                if len(text) >= LEAST_CHARACTERS
            ]
            if not found:
                sys.exit(f"{package}: has no files {source.files}")
            rows.setdefault(source.kind, []).extend(found)
            [archive] = Path(work, package).glob("*.deb")
            release = run("dpkg-deb", "-f", str(archive), "Version").strip()
            about.append(f"| {source.kind} | {package} | {release} | {source.licence} |")
    rows["code"] = [
        {"text": text, "source": f"python: {path}"}
        for path, text in library_texts()
        if len(text) >= LEAST_CHARACTERS
    ]
    about.append(f"| code | Python's library | {python_version()} | PSF |")
    folder.mkdir(parents=True)
    for kind, texts in rows.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in texts)
        (folder / f"{kind}.jsonl").write_text(lines, "utf-8")
        size_mb = sum(len(row["text"]) for row in texts) / 1e6
        print(f"{kind}: {len(texts)} documents, {size_mb:.1f} million characters")
    (folder / "SOURCES.md").write_text("\n".join([*about, ""]), "utf-8")


if __name__ == "__main__":
    main()

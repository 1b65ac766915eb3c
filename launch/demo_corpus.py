"""The text of the demo, made from what every CPython installation carries.

    python launch/demo_corpus.py --output data/demo

writes three training domains and two validation targets, each as OUTPUT/NAME.jsonl and as a Megatron dataset:

    code           sources of the standard library, cut into documents at functions and classes
    prose          English: help topics (pydoc_data.topics) and paragraphs of docstrings that read as sentences
    shuffled       harmful on purpose: documents of both with their characters in random order
    target_code    modules that no training document comes from
    target_prose   topics and modules' docstrings that no training document comes from

A module gives either its source or its docstrings, never both, and no paragraph of prose occurs in the code. The same
Python version, seed and sizes give the same text.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, installed or not

from inrun_megatron.data.corpora import write_corpus
from inrun_megatron.data.indexed import IndexedFile
from inrun_megatron.errors import UserError

# Not written as a library is (tests, tables of characters, vendored or generated files).
LEFT_OUT = {"site-packages", "test", "tests", "idle_test", "encodings", "lib2to3", "ensurepip", "pydoc_data"}
DOCUMENT_CHARACTERS = 2000  # documents are cut at the first opportunity after this many
SOURCE_BYTES = 16_000
STOP_WORDS = set(
    [
        "the",
        "a",
        "an",
        "of",
        "is",
        "are",
        "to",
        "in",
        "and",
        "that",
        "for",
        "be",
        "it",
        "as",
        "or",
        "with",
        "not",
        "by",
        "on",
        "if",
        "this",
        "from",
        "which",
        "when",
    ]
)


@dataclass(frozen=True)
class Source:
    """A module or a help topic: its documents are all for training or all for validation."""

    name: str
    documents: tuple[tuple[str, str], ...]
    """(place, text)."""


def modules() -> list[tuple[str, str]]:
    """(path below the standard library, text) of its modules, sorted by path."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if LEFT_OUT.isdisjoint(parts) and not parts[-1].startswith("_sysconfigdata"):
            try:
                found.append(("/".join(parts), path.read_bytes().decode("utf-8").replace("\r\n", "\n")))
            except (OSError, UnicodeDecodeError):
                continue  # a distribution may ship a broken link or a file in another encoding
    return found


def code_documents(path: str, text: str) -> Source:
    """A module's source, cut before a function, a method or a class."""
    documents: list[tuple[str, str]] = []
    lines: list[str] = []
    first, size, blank = 1, 0, True
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        whole = re.match(r"(    )?(@|def |async def |class )", line) or size >= 2 * DOCUMENT_CHARACTERS
        if size >= DOCUMENT_CHARACTERS and blank and whole:
            documents.append((f"{path}:{first}", "".join(lines)))
            lines, first, size = [], number, 0
        lines.append(line)
        size += len(line)
        blank = not line.strip()
    if "".join(lines).strip():
        documents.append((f"{path}:{first}", "".join(lines)))
    return Source(path, tuple(documents))


def english(text: str) -> Iterator[str]:
    """The paragraphs of `text` that read as English sentences, each on one line."""
    for block in re.split(r"\n\s*\n", text):
        paragraph = " ".join(block.split())
        letters = sum(character.isalpha() or character == " " for character in paragraph)
        if len(paragraph) < 80 or letters < 0.88 * len(paragraph):
            continue
        if not paragraph[0].isupper() or paragraph[-1] not in ".:!?" or ">>>" in block or "  - " in block:
            continue
        words = re.findall(r"[a-z]+", paragraph.lower())
        if sum(word in STOP_WORDS for word in words) >= 0.2 * len(words):
            yield paragraph


def docstrings(text: str) -> Iterator[str]:
    """All docstrings of a module, in order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old sources
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring


def prose_documents(name: str, texts: Iterable[str], seen: set[str], code: str) -> Source:
    """Paragraphs of English from `texts`: each once (`seen` collects them) and none that `code` contains."""
    documents: list[tuple[str, str]] = []
    paragraphs: list[str] = []
    for text in texts:
        for paragraph in english(text):
            if paragraph in seen or paragraph in code:
                continue
            seen.add(paragraph)
            paragraphs.append(paragraph)
            if sum(map(len, paragraphs)) >= DOCUMENT_CHARACTERS:
                documents.append((f"{name} #{len(documents) + 1}", "\n\n".join(paragraphs) + "\n"))
                paragraphs = []
    if paragraphs:
        documents.append((f"{name} #{len(documents) + 1}", "\n\n".join(paragraphs) + "\n"))
    return Source(name, tuple(documents))


def largest_share(size: int) -> int:
    """What one module or topic gives at most to `size` bytes: many sources rather than a few long ones."""
    return min(SOURCE_BYTES, max(size // 16, DOCUMENT_CHARACTERS))


def take(sources: Iterator[Source], domain: str, size: int) -> list[dict[str, Any]]:
    """Documents of the next sources, until they hold `size` bytes, as records."""
    records: list[dict[str, Any]] = []
    total, share = 0, largest_share(size)
    while total < size and (source := next(sources, None)) is not None:
        end = min(size, total + share)
        for place, text in source.documents:
            if total < end:
                records.append({"text": text, "source": place, "module": source.name, "domain": domain})
                total += len(text.encode())
    return records


def build(seed: int, train_bytes: int, target_bytes: int) -> dict[str, list[dict[str, Any]]]:
    """The records of every domain and target, by name."""
    from pydoc_data.topics import topics

    order = random.Random(seed)
    files = modules()
    order.shuffle(files)
    chosen = 0  # so many modules become code; the others give their docstrings
    for size in (target_bytes, train_bytes):
        missing, share = size, largest_share(size)
        while missing > 0 and chosen < len(files):
            missing -= min(len(files[chosen][1].encode()), share)
            chosen += 1
    code = iter([code_documents(path, text) for path, text in files[:chosen]])
    code_text = " ".join(" ".join(text.split()) for _, text in files[:chosen])
    seen: set[str] = set()
    prose_sources = [
        prose_documents(f"topic {name}", [topics[name]], seen, code_text) for name in sorted(topics)
    ]
    prose_sources += [
        prose_documents(path, docstrings(text), seen, code_text) for path, text in files[chosen:]
    ]
    prose_sources = [source for source in prose_sources if source.documents]
    order.shuffle(prose_sources)
    prose = iter(prose_sources)
    records = {
        "target_code": take(code, "code", target_bytes),
        "target_prose": take(prose, "prose", target_bytes),
        "code": take(code, "code", train_bytes),
        "prose": take(prose, "prose", train_bytes),
    }
    for name in ("code", "prose"):
        order.shuffle(records[name])
    records["shuffled"] = shuffled(records["code"] + records["prose"], train_bytes, order)
    return records


def shuffled(records: list[dict[str, Any]], size: int, order: random.Random) -> list[dict[str, Any]]:
    """Random documents with their characters in random order: the right frequencies, and nothing else of language."""
    chosen, total = [], 0
    for record in order.sample(records, len(records)):
        if total >= size:
            break
        text = "".join(order.sample(record["text"], len(record["text"])))
        place = f"shuffled {record['domain']}: {record['source']}"
        chosen.append({"text": text, "source": place, "module": record["module"], "domain": "shuffled"})
        total += len(text.encode())
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="directory to write, e.g. data/demo")
    parser.add_argument("--seed", type=int, default=1234, help="which modules and topics, and the shuffles")
    parser.add_argument("--train-bytes", type=int, default=600_000, help="text of each training domain")
    parser.add_argument("--target-bytes", type=int, default=65_536, help="text of each validation target")
    parser.add_argument("--overwrite", action="store_true", help="write again even if the corpus is there")
    options = parser.parse_args()
    if options.train_bytes < 1 or options.target_bytes < 1:
        raise UserError("--train-bytes and --target-bytes must be positive")
    manifest = options.output / "corpus.json"
    settings = {
        "python": sys.version.split()[0],
        "seed": options.seed,
        "train_bytes": options.train_bytes,
        "target_bytes": options.target_bytes,
    }
    if options.overwrite or not up_to_date(manifest, settings):
        manifest.unlink(missing_ok=True)
        domains = {}
        for name, records in build(options.seed, options.train_bytes, options.target_bytes).items():
            if not records:
                raise UserError(
                    f"this Python installation carries no text for {name}: use a complete CPython"
                )
            data = IndexedFile(write_corpus(options.output / name, records))
            domains[name] = {"documents": data.num_documents, "tokens": data.num_tokens}
        manifest.write_text(
            json.dumps({"settings": settings, "domains": domains}, indent=1) + "\n", encoding="utf-8"
        )
    for name, figures in json.loads(manifest.read_text(encoding="utf-8"))["domains"].items():
        print(
            f"{options.output / name}: {figures['documents']:,} documents, {figures['tokens']:,} byte tokens"
        )


def up_to_date(manifest: Path, settings: dict[str, Any]) -> bool:
    """Whether the corpus of these settings is there and whole."""
    try:
        record = json.loads(manifest.read_text(encoding="utf-8"))
        for name in record["domains"]:
            IndexedFile(manifest.parent / name)
    except (OSError, ValueError, KeyError):  # a UserError about a broken dataset is a ValueError too
        return False
    return bool(record["settings"] == settings)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"demo_corpus: {error}")

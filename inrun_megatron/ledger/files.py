"""Durable file operations: after each of these returns, a crash or power cut cannot undo what it did."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from inrun_megatron.errors import UserError

TEMPORARY_SUFFIX = ".tmp"


def fsync_directory(directory: Path) -> None:
    """Make renames and removals in `directory` durable (fsync of a file does not cover its name)."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems refuse fsync on a directory; their renames are synchronous on the server.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
    finally:
        os.close(descriptor)


def fsync_file(path: Path) -> None:
    """Make what another library wrote to `path` durable; not its name."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(directory: Path) -> None:
    """Create `directory` and its parents, each durably."""
    missing = []
    current = directory
    while not current.exists():
        missing.append(current)
        current = current.parent
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        fsync_directory(path.parent)


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Write `content` under a temporary name, fsync, rename onto `path`, fsync the directory.

    A reader sees the old file or the whole new one, never a part. Raises UserError, with the temporary file
    removed, when the file system refuses (full, read-only, quota).
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync_directory(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            temporary.unlink(missing_ok=True)
        raise refused(path, error) from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to; renamed onto `path` at the end, removed after an error.

    For what can be made again: whole or not there, but not synced. OSErrors are the caller's to word.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            temporary.unlink(missing_ok=True)


def refused(path: Path | str, error: OSError) -> UserError:
    """What to tell the user when the file system refuses to write."""
    return UserError(
        f"cannot write {path}: {error.strerror or error}; what was committed before is intact: "
        "free or repair the file system, then resume from the last checkpoint with --load"
    )


def write_json(path: Path, record: dict[str, Any]) -> None:
    """`write_atomically` for one JSON object; paths and other non-JSON leaves are written as their text."""
    write_atomically(path, (json.dumps(record, indent=1, default=str) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read one JSON object. Raises UserError naming the file when it is missing, unreadable or not an
    object."""
    try:
        record = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); restore it from a copy") from error
    if not isinstance(record, dict):
        raise UserError(
            f"{path} holds a JSON {type(record).__name__}, expected an object; restore it from a copy"
        )
    return record


PIECES, PIECE_BYTES = 64, 1 << 16
"""What `digest_of` reads of a file beyond 4 MiB."""


def digest_of(path: Path) -> str:
    """Hex sha256 of a file's size and of 64 evenly spread pieces of it; of all of it up to 4 MiB.

    For token files, of which reading all may take an hour: other text under the same index shows in the pieces.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        if size <= PIECES * PIECE_BYTES:
            digest.update(file.read())
        else:
            for piece in range(PIECES):
                file.seek(piece * (size - PIECE_BYTES) // (PIECES - 1))
                digest.update(file.read(PIECE_BYTES))
    return digest.hexdigest()


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file's bytes, read in pieces of 4 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()

"""JSON files, short hashes of settings, and the hash of this package's sources."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import bert_encoding
from bert_encoding.core.errors import InputError, first_line
from bert_encoding.core.storage import Place, atomic_path


def content_key(*parts: Any) -> str:
    """Return a hash of 16 hexadecimal digits of plain values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def code_fingerprint() -> str:
    """Return a hash of the sources of ``bert_encoding``, on which results depend besides the settings."""
    root = Path(bert_encoding.__file__).parent
    digest = hashlib.sha256()
    for file in sorted([*root.rglob("*.py"), *root.glob("language_model/data/general/*.txt")]):
        digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


@contextmanager
def output_file(file: Path) -> Iterator[Path]:
    """Yield a temporary name, and rename it to ``file`` at the end; raise InputError if it cannot be written."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(file) as temporary:
            yield temporary
    except OSError as error:
        raise InputError(f"{file}: cannot be written ({error.strerror or first_line(error)})") from None


def write_json(path: Place, content: Any) -> None:
    """Write JSON atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, default=_plain) + "\n")


def read_json(path: Place, required: tuple[str, ...] = ()) -> dict[str, Any]:
    """Read a JSON object; raise InputError if the file is damaged or lacks a required name."""
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: damaged ({first_line(error)}); move it away to continue without it") from None
    missing = [name for name in required if not isinstance(content, dict) or name not in content]
    if missing or not isinstance(content, dict):
        raise InputError(f"{path}: damaged (no {', '.join(missing) or 'object'}); move it away to continue without it")
    return content


def _plain(value: Any) -> Any:
    """Convert NumPy scalars and paths for JSON."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")

"""Is a file on this machine the one that was inspected on another? A stamp tells, without reading all of it."""

import functools
import hashlib
import platform
import stat
from pathlib import Path

from bert_encoding.errors import InputError

N_SAMPLES, SAMPLE_BYTES = 8, 4096


def file_stamp(path: Path) -> str:
    """Return a hash of a file's size and of samples of its bytes, its first and last ones among them.

    It tells other subjects, stories, preprocessing and half copies from the file, but not a single changed response;
    whole brains are too large to be read by every worker only to be compared.

    Raises
    ------
    InputError
        if it is no file.
    OSError
        if it cannot be read.
    """
    check_regular(path)
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    last = max(0, size - SAMPLE_BYTES)
    with path.open("rb") as file:
        for at in range(N_SAMPLES):
            file.seek(last * at // (N_SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]


@functools.cache
def check_stamp(path: Path, stamp: str) -> None:
    """Refuse a file that is not the one of the stamp; looked at once a process.

    Raises
    ------
    InputError
        naming file and machine.
    """
    try:
        found = file_stamp(path)
    except OSError:  # whoever opens it will say why it cannot
        return
    if found != stamp:
        raise InputError(
            f"{path}: on {platform.node()} not the responses that this study began with; copy them there anew, or use "
            "a disk that all machines share"
        )


def check_regular(path: Path) -> None:
    """Refuse what is there and neither file nor folder: reading a pipe or a device may never end."""
    try:
        mode = path.stat().st_mode
    except OSError:  # whoever opens it will say why it cannot
        return
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise InputError(f"{path}: not a file but a {'pipe' if stat.S_ISFIFO(mode) else 'device or socket'}")

"""Unpickle what comes on standard input, each in a forked process, and report what the interpreter was made to do.

A program of its own: ``python -I -S watched_unpickler.py safe_pickle.py``. Input is a length, a flag and a pickle,
repeated; with the flag set, the ordinary unpickler reads it. Output is one line of JSON for each.
"""

import codecs
import importlib.util
import io
import json
import os
import pickle
import struct
import sys
from typing import Any, BinaryIO

HEAD = "<I?"
ALWAYS_BAD = ("os.", "subprocess.", "socket.", "ctypes.", "shutil.", "exec", "compile", "code.")


class Watch:
    """An audit hook that records the events that only an attack causes, while ``events`` is a list."""

    events: list[str] | None = None

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.events is not None and is_bad(event, arguments):
            self.events.append(f"{event} {arguments!r:.200}")


def is_bad(event: str, arguments: tuple[Any, ...]) -> bool:
    """Whether an audit event is one that only an attack causes."""
    if event == "open":
        mode, flags = arguments[1], arguments[2]
        return bool(set(mode or "") & set("wax+")) or bool((flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    if event == "import":
        return arguments[0] not in sys.modules
    return event == "object.__setattr__" or event.startswith(ALWAYS_BAD)


def answer(content: bytes, safe_pickle: Any, watch: Watch, is_plain: bool) -> dict[str, Any]:
    """Unpickle in this process."""
    watch.events = events = []
    try:
        result = {"stories": pickle.loads(content) if is_plain else safe_pickle.convert(content)}  # noqa: S301
    except BaseException as error:
        result = {"refused": f"{type(error).__name__}: {error}"}
    watch.events = None
    return result | {"events": events}


def main(program: str, requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer until the input ends."""
    spec = importlib.util.spec_from_file_location("safe_pickle", program)
    assert spec is not None and spec.loader is not None
    safe_pickle = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(safe_pickle)
    for encoding in ("raw-unicode-escape", "utf-8", "ascii", "latin1"):  # imported now, not while events are watched
        codecs.lookup(encoding)
    watch = Watch()
    sys.addaudithook(watch)
    while head := requests.read(struct.calcsize(HEAD)):
        n_bytes, is_plain = struct.unpack(HEAD, head)
        content = requests.read(n_bytes)
        if not os.fork():
            safe_pickle.limit_process()
            text = json.dumps(answer(content, safe_pickle, watch, is_plain), default=lambda value: type(value).__name__)
            answers.write(text.encode("utf-8") + b"\n")
            answers.flush()
            os._exit(0)
        _, status = os.wait()
        if status:
            answers.write(json.dumps({"events": [f"the process ended with status {status}"]}).encode() + b"\n")
            answers.flush()


if __name__ == "__main__":
    main(sys.argv[1], io.BufferedReader(sys.stdin.buffer.raw), sys.stdout.buffer)

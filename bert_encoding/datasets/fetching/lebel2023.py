"""Fetch what a study needs of the public stories data set (LeBel et al. 2023, OpenNeuro ds003020, CC0).

Contract
--------
``derivative/respdict.json``
    story -> number of volumes; names the stories.
``derivative/TextGrids/<story>.TextGrid``
    the words, once a story.
``derivative/preprocessed_data/<subject>/<story>.hf5``
    the responses, around 200 MB each. UTS01 to UTS03 heard 84 stories, UTS04 26 (not `life`), UTS05 to UTS08 27,
    UTS09 54.

The content lies in public object storage. What it must be is written in the data set's git repository: there each
large file is a symbolic link of git-annex, whose target ends in a key of size and checksum,
``MD5E-s<bytes>--<md5>.<extension>`` (https://git-annex.branchable.com/internals/key_format/). JSON lies in git itself.
The storage's own ETag is no checksum of files that were uploaded in several parts.
"""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import filelock
from rich.console import Console

from bert_encoding.core.errors import InputError
from bert_encoding.datasets.fetching.download import Fetched, RemoteFile, disk_error, download, set_aside
from bert_encoding.datasets.fetching.progress import say
from bert_encoding.datasets.fetching.threads import GO_ON, each, raise_first
from bert_encoding.datasets.fetching.web import Client, check_url, make_client, read_small

BASE_URL = "https://s3.amazonaws.com/openneuro.org/ds003020/"
KEYS_URL = "https://raw.githubusercontent.com/OpenNeuroDatasets/ds003020/main/"
SUBJECTS = tuple(f"UTS{number:02d}" for number in range(1, 10))
RESPDICT = "derivative/respdict.json"
LOCK = ".fetch.lock"
NAME = re.compile(r"[A-Za-z0-9_-]{1,100}")
ANNEX_LINK = re.compile(r"[^\s]*annex/objects/(?:[^\s/]+/)*(MD5|SHA256)E?-s(\d{1,15})--([0-9a-f]+)(?:\.[\w.-]*)?")
DIGEST_LENGTHS = {"MD5": 32, "SHA256": 64}


def fetch_lebel2023(
    subjects: list[str],
    to: Path,
    stories: list[str] | None = None,
    base_url: str = BASE_URL,
    keys_url: str = KEYS_URL,
    n_at_once: int = 4,
    console: Console | None = None,
) -> Fetched:
    """Make ``to/derivative/`` hold the words and responses of some subjects and stories, verified.

    What is there already is verified and kept; what a run before left half fetched is resumed.

    Parameters
    ----------
    stories : all that a subject heard, if None
    base_url, keys_url : where the content and the git-annex keys lie; each is followed by ``derivative/...``
    n_at_once : files at a time

    Raises
    ------
    InputError
        if a subject or story is not in the data set, an address is not https, the disk is full, or a file could not
        be fetched. All that was fetched is kept.
    """
    _check_names(subjects, stories, n_at_once)
    console = console or Console(stderr=True)
    way = Way(check_url(base_url), check_url(keys_url), to, n_at_once, lambda line: say(console, line))
    content, keys = make_client(way.base_url, n_at_once), make_client(way.keys_url, n_at_once)
    try:
        with _only_one(to):
            table = _fetch_table(way, keys, content, console)
            files = _look_up(way, keys, list(dict.fromkeys(subjects)), stories)
            rest = download(content, files, to, n_at_once, console)
    except OSError as error:
        raise disk_error(to, error) from None
    finally:
        keys.pool.clear()
        content.pool.clear()
    return table.plus(rest)


class Way(NamedTuple):
    """From where to where, how many at once, and how to tell the user."""

    base_url: str
    keys_url: str
    to: Path
    n_at_once: int
    say: Callable[[str], None]


def _check_names(subjects: list[str], stories: list[str] | None, n_at_once: int) -> None:
    for subject in subjects:
        if subject not in SUBJECTS:
            raise InputError(f"subject {subject!r} is not in the data set; give {SUBJECTS[0]} to {SUBJECTS[-1]}")
    if not subjects:
        raise InputError(f"no subject named; give some of {SUBJECTS[0]} to {SUBJECTS[-1]}")
    if stories is not None and not stories:
        raise InputError("no story named; give some, or leave the choice out for all")
    for story in stories or ():
        if not NAME.fullmatch(story):
            raise InputError(f"story {story!r}: not a name; letters, digits, '_' and '-' make one")
    if n_at_once < 1:
        raise InputError(f"{n_at_once} files at once: give 1 or more")


@contextmanager
def _only_one(to: Path) -> Iterator[None]:
    """Keep others from fetching into the same folder: two writers would spoil each other's parts."""
    to.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(to / LOCK, blocking=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise InputError(f"{to}: another fetch is at work in this folder; wait for it or end it") from None
    try:
        yield
    finally:
        lock.release()


def _fetch_table(way: Way, keys: Client, content: Client, console: Console) -> Fetched:
    """Write the table of stories as it lies in git, or fetch it as other files, should it lie in git-annex one day."""
    url, path = way.keys_url + RESPDICT, way.to / RESPDICT
    try:
        text = read_small(keys, url)
    except InputError as error:
        raise InputError(f"{error}; {GO_ON}") from None
    if text is None:
        raise InputError(f"{url}: no such file; is the address right, and the branch in it?")
    if b"annex/objects/" in text:
        return download(content, [_remote_file(way, text, RESPDICT)], way.to, 1, console)
    _stories(text, url)
    if path.is_file():
        if path.read_bytes() == text:
            return Fetched(1, 1, 0, way.to)
        set_aside(path, way.say)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(text)
    part.replace(path)
    return Fetched(1, 0, len(text), way.to)


def _stories(text: bytes, where: str) -> list[str]:
    try:
        table = json.loads(text)
    except (ValueError, RecursionError):
        raise InputError(f"{where}: not JSON; expected a table of stories") from None
    if not isinstance(table, dict) or not table:
        raise InputError(f"{where}: expected a table of stories, found {type(table).__name__}")
    for story, n_trs in table.items():
        if not NAME.fullmatch(story) or type(n_trs) is not int or n_trs <= 0:
            raise InputError(f"{where}: {story!r}: {n_trs!r}: expected the name of a story and its number of volumes")
    return list(table)


def _look_up(way: Way, keys: Client, subjects: list[str], named: list[str] | None) -> list[RemoteFile]:
    """Return the files to fetch, texts first."""
    table = way.to / RESPDICT
    stories = _chosen(_stories(table.read_bytes(), str(table)), named, way.keys_url)
    way.say(f"looking up the keys of {len(stories)} stories of {', '.join(subjects)}")
    found = _keys_of(way, keys, [_responses(subject, story) for subject in subjects for story in stories])
    for subject in subjects:
        missing = [story for story in stories if _responses(subject, story) not in found]
        if missing and named is not None:
            raise InputError(f"{subject} has no responses to {missing[0]}; leave the story or the subject out")
        if len(missing) == len(stories):
            raise InputError(f"{way.keys_url}: no responses of {subject}; is the address right, and the branch in it?")
    heard = [story for story in stories if any(_responses(subject, story) in found for subject in subjects)]
    texts = _keys_of(way, keys, [_text(story) for story in heard])
    for story in heard:
        if _text(story) not in texts:
            if named is not None:
                raise InputError(f"{way.keys_url}{_text(story)}: no such file; leave the story out")
            way.say(f"{story}: left out, since there is no {_text(story)}")
    with_text = [_responses(subject, story) for subject in subjects for story in heard if _text(story) in texts]
    return [*texts.values(), *(found[path] for path in with_text if path in found)]


def _chosen(known: list[str], named: list[str] | None, keys_url: str) -> list[str]:
    for story in named or ():
        if story not in known:
            raise InputError(f"story {story} is not in the data set; see {keys_url}{RESPDICT} for those that are")
    return known if named is None else list(dict.fromkeys(named))


def _keys_of(way: Way, keys: Client, paths: list[str]) -> dict[str, RemoteFile]:
    """Return path -> what the file must hold, for the files that the data set has."""

    def look_up(path: str) -> RemoteFile | None:
        text = read_small(keys, way.keys_url + path)
        return None if text is None else _remote_file(way, text, path)

    found = each(look_up, paths, way.n_at_once, keys.stop)
    raise_first(found)
    return {path: file for path, file in zip(paths, found, strict=True) if isinstance(file, RemoteFile)}


def _responses(subject: str, story: str) -> str:
    return f"derivative/preprocessed_data/{subject}/{story}.hf5"


def _text(story: str) -> str:
    return f"derivative/TextGrids/{story}.TextGrid"


def _remote_file(way: Way, text: bytes, path: str) -> RemoteFile:
    """Return what a file must hold, from the link that stands for it in git."""
    link = text.decode("ascii", "replace").strip()
    found = ANNEX_LINK.fullmatch(link)
    if not found or len(found[3]) != DIGEST_LENGTHS[found[1]]:
        raise InputError(
            f"{way.keys_url}{path}: expected a git-annex link that ends in a key of MD5 or SHA256, "
            f"found {link[:80]!r}; is the address right?"
        )
    return RemoteFile(way.base_url + path, way.to / path, int(found[2]), found[1].lower(), found[3])

"""Fetch what a study needs of the public stories data set (LeBel et al. 2023, OpenNeuro ds003020, CC0).

``bert_encoding.datasets.lebel2023`` describes the files; responses have around 200 MB each. The content is in public
object storage. Its size and checksum are in the data set's git repository: there each large file is a symbolic link of
git-annex, whose target ends in a key of size and checksum, ``MD5E-s<bytes>--<md5>.<extension>``
(https://git-annex.branchable.com/internals/key_format/). JSON is in git itself. The storage's own ETag is no checksum
of files that were uploaded in several parts.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import filelock
from rich.console import Console

from bert_encoding.core.command_line import print_lines
from bert_encoding.core.errors import InputError
from bert_encoding.core.storage import atomic_path
from bert_encoding.datasets.fetching.download import RemoteFile, disk_error, download, set_aside
from bert_encoding.datasets.fetching.http_client import Client, check_url, read_small
from bert_encoding.datasets.fetching.threads import map_in_threads

BASE_URL = "https://s3.amazonaws.com/openneuro.org/ds003020/"
KEYS_URL = "https://raw.githubusercontent.com/OpenNeuroDatasets/ds003020/main/"
SUBJECTS = tuple(f"UTS{number:02d}" for number in range(1, 10))
RESPDICT = "derivative/respdict.json"
LOCK = ".fetch.lock"
N_CONNECTIONS = 4
NAME = re.compile(r"[A-Za-z0-9_-]{1,100}")
ANNEX_LINK = re.compile(r"[^\s]*annex/objects/(?:[^\s/]+/)*(MD5|SHA256)E?-s(\d{1,15})--([0-9a-f]+)(?:\.[\w.-]*)?")
DIGEST_LENGTHS = {"MD5": 32, "SHA256": 64}


class FetchResult(NamedTuple):
    """How many files a folder now holds, and how many of them were there before."""

    n_files: int
    n_already_there: int


class FetchPlan(NamedTuple):
    """Where files and their git-annex keys are read, and where files are written."""

    base_url: str
    keys_url: str
    folder: Path
    client: Client
    console: Console


def fetch_lebel2023(
    subjects: list[str],
    to: Path,
    stories: list[str] | None = None,
    base_url: str = BASE_URL,
    keys_url: str = KEYS_URL,
    *,
    console: Console,
) -> FetchResult:
    """Download words and responses of some subjects and stories to ``to/derivative/``, and verify them.

    Without ``stories``, all that a subject heard. Existing files are verified and kept; partial files of an earlier run
    are resumed.

    Raises InputError if a subject or story is not in the data set, an address is not https, the disk is full, or a file
    could not be downloaded. All complete files are kept.
    """
    for subject in subjects:
        if subject not in SUBJECTS:
            raise InputError(f"subject {subject!r} is not in the data set; give {SUBJECTS[0]} to {SUBJECTS[-1]}")
    base_url, keys_url = check_url(base_url), check_url(keys_url)
    try:
        with _folder_lock(to), Client(N_CONNECTIONS) as client:
            plan = FetchPlan(base_url, keys_url, to, client, console)
            known, table_existed = _fetch_table(plan)
            for story in stories or ():
                if story not in known:
                    raise InputError(
                        f"story {story!r} is not in the data set; see {keys_url}{RESPDICT} for its stories"
                    )
            chosen = list(dict.fromkeys(stories or known))
            files = _look_up(plan, list(dict.fromkeys(subjects)), chosen, may_omit=stories is None)
            n_already_there = download(client, files, to, plan.console)
    except OSError as error:
        raise disk_error(to, error) from None
    return FetchResult(1 + len(files), table_existed + n_already_there)


@contextmanager
def _folder_lock(folder: Path) -> Iterator[None]:
    """Prevent two programs from fetching into the same folder: they would damage each other's parts."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(folder / LOCK, blocking=False):
            yield
    except filelock.Timeout:
        raise InputError(f"{folder}: another fetch is running in this folder; wait for it or end it") from None


def _fetch_table(plan: FetchPlan) -> tuple[list[str], bool]:
    """Write the table of stories, and return their names and whether the same table existed before."""
    url, path = plan.keys_url + RESPDICT, plan.folder / RESPDICT
    (text,) = map_in_threads(lambda address: read_small(plan.client, address), [url], plan.client)
    if text is None:
        raise InputError(f"{url}: no such file; check the address and the branch in it")
    stories = _parse_table(text, url)
    if path.is_file():
        if path.read_bytes() == text:
            return stories, True
        set_aside(path, plan.console)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_bytes(text)
    return stories, False


def _parse_table(text: bytes, url: str) -> list[str]:
    try:
        table = json.loads(text)
    except (ValueError, RecursionError):
        raise InputError(f"{url}: not JSON; expected a table of stories") from None
    if not isinstance(table, dict) or not table:
        raise InputError(f"{url}: expected a table of stories, got {type(table).__name__}")
    for story, n_trs in table.items():
        if not NAME.fullmatch(story) or type(n_trs) is not int or n_trs <= 0:
            raise InputError(f"{url}: {story!r}: {n_trs!r}: expected the name of a story and its number of volumes")
    return list(table)


def _look_up(plan: FetchPlan, subjects: list[str], stories: list[str], may_omit: bool) -> list[RemoteFile]:
    """Return the files to download, transcripts first; ``may_omit`` those that the data set lacks."""
    print_lines(plan.console, f"looking up the keys of {len(stories)} stories of {', '.join(subjects)}")
    responses = _remote_files(plan, [_responses(subject, story) for subject in subjects for story in stories])
    for subject in subjects:
        missing = [story for story in stories if _responses(subject, story) not in responses]
        if missing and not may_omit:
            raise InputError(f"{subject} has no responses to {missing[0]}; omit the story or the subject")
        if len(missing) == len(stories):
            raise InputError(f"{plan.keys_url}: no responses of {subject}; check the address and the branch in it")
    heard = [story for story in stories if any(_responses(subject, story) in responses for subject in subjects)]
    transcripts = _remote_files(plan, [_transcript(story) for story in heard])
    for story in heard:
        if _transcript(story) in transcripts:
            continue
        if not may_omit:
            raise InputError(f"{plan.keys_url}{_transcript(story)}: no such file; omit the story")
        print_lines(plan.console, f"{story}: omitted, because there is no {_transcript(story)}")
        for subject in subjects:
            responses.pop(_responses(subject, story), None)
    return [*transcripts.values(), *responses.values()]


def _remote_files(plan: FetchPlan, paths: list[str]) -> dict[str, RemoteFile]:
    """Return path -> file, for the paths that the data set has."""

    def look_up(path: str) -> RemoteFile | None:
        link = read_small(plan.client, plan.keys_url + path)
        return None if link is None else _remote_file(plan, link, path)

    files = map_in_threads(look_up, paths, plan.client)
    return {path: file for path, file in zip(paths, files, strict=True) if file is not None}


def _responses(subject: str, story: str) -> str:
    return f"derivative/preprocessed_data/{subject}/{story}.hf5"


def _transcript(story: str) -> str:
    return f"derivative/TextGrids/{story}.TextGrid"


def _remote_file(plan: FetchPlan, content: bytes, path: str) -> RemoteFile:
    """Return the size and checksum of a file, from the git-annex link that represents it in git."""
    link = content.decode("ascii", "replace").strip()
    key = ANNEX_LINK.fullmatch(link)
    if not key or len(key[3]) != DIGEST_LENGTHS[key[1]]:
        raise InputError(
            f"{plan.keys_url}{path}: expected a git-annex link that ends in a key of MD5 or SHA256, "
            f"got {link[:80]!r}; check the address"
        )
    return RemoteFile(plan.base_url + path, plan.folder / path, int(key[2]), key[1].lower(), key[3])

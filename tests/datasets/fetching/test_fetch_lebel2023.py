"""Fetching the public data set: which files, from which keys, and what a wrong name or answer says."""

import hashlib
import io
import json
import os
import shutil
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import filelock
import numpy as np
import pytest
from faulty_server import Act, FaultyServer, answer, cut, drop
from rich.console import Console

from bert_encoding.core.errors import InputError
from bert_encoding.datasets.fetching import http_client
from bert_encoding.datasets.fetching.lebel2023 import BASE_URL, KEYS_URL, LOCK, FetchResult, fetch_lebel2023

STORIES = ("life", "souls", "wheretheressmoke")
HEARD = {"UTS03": STORIES, "UTS04": STORIES[1:]}
RESPDICT = "derivative/respdict.json"


def response_path(subject: str, story: str) -> str:
    return f"derivative/preprocessed_data/{subject}/{story}.hf5"


def text_path(story: str) -> str:
    return f"derivative/TextGrids/{story}.TextGrid"


@pytest.fixture
def tree() -> dict[str, bytes]:
    """Path -> content of a small imitation; the bytes mean nothing."""
    rng = np.random.default_rng(0)
    files = {text_path(story): rng.bytes(500) for story in STORIES}
    files |= {response_path(subject, story): rng.bytes(4000) for subject in HEARD for story in HEARD[subject]}
    return files | {RESPDICT: json.dumps(dict.fromkeys(STORIES, 100)).encode()}


@pytest.fixture
def server(tree: dict[str, bytes]) -> Iterator[FaultyServer]:
    with FaultyServer() as faulty:
        faulty.files = {f"content/{path}": body for path, body in tree.items() if path != RESPDICT}
        faulty.files |= {f"keys/{path}": link(path, body) for path, body in tree.items() if path != RESPDICT}
        faulty.files[f"keys/{RESPDICT}"] = tree[RESPDICT]
        yield faulty


def link(path: str, body: bytes) -> bytes:
    """Write a link as git-annex does: TextGrids had no extension in their keys when they were added."""
    extension = ".hf5" if path.endswith(".hf5") else ""
    key = f"MD5E-s{len(body)}--{hashlib.md5(body).hexdigest()}{extension}"
    return f"../../.git/annex/objects/km/k1/{key}/{key}".encode()


def fetch(server: FaultyServer, folder: Path, subjects: tuple[str, ...] = ("UTS03",), **more: object) -> FetchResult:
    more = {"base_url": server.url + "content", "keys_url": server.url + "keys/", **more}
    return fetch_lebel2023(list(subjects), folder, console=Console(file=io.StringIO()), **more)  # type: ignore[arg-type]


def on_disk(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != LOCK)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_the_addresses_are_those_of_the_data_set() -> None:
    assert http_client.check_url(BASE_URL) == "https://s3.amazonaws.com/openneuro.org/ds003020/"
    assert http_client.check_url(KEYS_URL) == "https://raw.githubusercontent.com/OpenNeuroDatasets/ds003020/main/"


def test_a_subject_with_all_its_stories(server: FaultyServer, tree: dict[str, bytes], tmp_path: Path) -> None:
    fetched = fetch(server, tmp_path / "new" / "data")
    expected = {path: body for path, body in tree.items() if "UTS04" not in path}
    assert on_disk(tmp_path / "new" / "data") == expected
    assert fetched == FetchResult(7, 0)
    server.behave()
    assert fetch(server, tmp_path / "new" / "data") == FetchResult(7, 7)
    assert not any(path.startswith("content/") for path, _ in server.requests)


def test_a_story_that_a_subject_did_not_hear_is_no_error(
    server: FaultyServer, tree: dict[str, bytes], tmp_path: Path
) -> None:
    fetch(server, tmp_path, ("UTS04", "UTS04"))
    assert on_disk(tmp_path) == {path: tree[path] for path in tree if "UTS03" not in path and "life" not in path}
    fetch(server, tmp_path, ("UTS03", "UTS04"))
    assert on_disk(tmp_path) == tree


def test_stories_may_be_named(server: FaultyServer, tree: dict[str, bytes], tmp_path: Path) -> None:
    assert fetch(server, tmp_path, stories=["souls", "souls"]).n_files == 3
    assert on_disk(tmp_path) == {
        path: tree[path] for path in (RESPDICT, text_path("souls"), response_path("UTS03", "souls"))
    }


def test_a_story_without_words_is_left_out_unless_named(server: FaultyServer, tmp_path: Path) -> None:
    del server.files["keys/" + text_path("souls")]
    fetch(server, tmp_path)
    assert not any("souls" in path for path in on_disk(tmp_path))
    with pytest.raises(InputError, match=r"keys/derivative/TextGrids/souls\.TextGrid: no such file; omit"):
        fetch(server, tmp_path, stories=["souls"])


@pytest.mark.parametrize(
    ("subjects", "more", "reason"),
    [
        (("UTS10",), {}, "subject 'UTS10' is not in the data set; give UTS01 to UTS09"),
        (("UTS03", "../UTS03"), {}, "subject '../UTS03' is not in the data set"),
        (("UTS03",), {"stories": ["../../etc/passwd"]}, "story '../../etc/passwd' is not in the data set"),
        (("UTS03",), {"stories": ["souls\n"]}, r"story 'souls\n' is not in the data set"),
        (("UTS03",), {"stories": ["soul"]}, "story 'soul' is not in the data set; see http://127"),
        (("UTS03", "UTS04"), {"stories": ["souls", "life"]}, "UTS04 has no responses to life"),
        (("UTS05",), {}, "no responses of UTS05; check the address"),
        (("UTS03",), {"base_url": "http://example.com/"}, "http://example.com/: use https"),
        (("UTS03",), {"keys_url": "file:///data/"}, "file:///data/: not a supported URL"),
    ],
)
def test_what_cannot_be_fetched_is_named(
    server: FaultyServer, tmp_path: Path, subjects: tuple[str, ...], more: dict[str, object], reason: str
) -> None:
    with pytest.raises(InputError) as caught:
        fetch(server, tmp_path, subjects, **more)
    assert reason in str(caught.value) and "\n" not in str(caught.value)
    assert set(on_disk(tmp_path)) <= {RESPDICT}
    assert not any(path.startswith("content/") for path, _ in server.requests)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "no such file; check the address and the branch in it"),
        (b"<html>", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[1]", "got list"),
        (b"{}", "got dict"),
        (b'{"../../x": 3}', "'../../x': 3: expected the name"),
        (b'{"souls": "many"}', "'souls': 'many': expected"),
        (b'{"souls": true}', "expected the name"),
        (b" " * (2**20 + 1), "larger than 1048576 bytes"),
    ],
)
def test_a_wrong_table_of_stories(server: FaultyServer, tmp_path: Path, text: bytes | None, reason: str) -> None:
    server.files |= {f"keys/{RESPDICT}": text}  # None is answered by 404
    with pytest.raises(InputError, match=r"keys/derivative/respdict\.json: ") as caught:
        fetch(server, tmp_path)
    assert reason in str(caught.value)
    assert on_disk(tmp_path) == {}


def test_an_edited_table_is_set_aside(server: FaultyServer, tree: dict[str, bytes], tmp_path: Path) -> None:
    fetch(server, tmp_path)
    (tmp_path / RESPDICT).write_text('{"souls": 7}')
    assert fetch(server, tmp_path) == FetchResult(7, 6)
    assert (tmp_path / RESPDICT).read_bytes() == tree[RESPDICT]
    (tmp_path / RESPDICT).write_text('{"souls": 8}')
    fetch(server, tmp_path)
    assert (tmp_path / (RESPDICT + ".wrong")).read_text() == '{"souls": 7}'
    assert (tmp_path / (RESPDICT + ".wrong1")).read_text() == '{"souls": 8}'


SOULS = text_path("souls")
MD5, SHA256 = (lambda body: hashlib.md5(body).hexdigest()), (lambda body: hashlib.sha256(body).hexdigest())


@pytest.mark.parametrize(
    "form",
    [
        "../../.git/annex/objects/km/k1/MD5E-s{n}--{md5}/MD5E-s{n}--{md5}",
        "../../.git/annex/objects/km/k1/MD5E-s{n}--{md5}.a.TextGrid/MD5E-s{n}--{md5}.a.TextGrid\n",
        "/annex/objects/MD5-s{n}--{md5}\n",
        ".git/annex/objects/X/Y/SHA256E-s{n}--{sha256}.TextGrid/SHA256E-s{n}--{sha256}.TextGrid",
    ],
)
def test_keys_of_git_annex(server: FaultyServer, tree: dict[str, bytes], tmp_path: Path, form: str) -> None:
    body = tree[SOULS]
    server.files["keys/" + SOULS] = form.format(n=len(body), md5=MD5(body), sha256=SHA256(body)).encode()
    fetch(server, tmp_path, stories=["souls"])
    assert (tmp_path / SOULS).read_bytes() == body
    server.files["content/" + SOULS] = body[:-1] + b"?"
    (tmp_path / SOULS).unlink()
    with pytest.raises(InputError, match=rf"souls\.TextGrid: expected 500 bytes with (md5 {MD5(body)}|sha256)"):
        fetch(server, tmp_path, stories=["souls"])


@pytest.mark.parametrize(
    "text",
    [
        b"File type = \"ooTextFile\"",
        b"../../.git/annex/objects/a/b/SHA1-s5--" + b"0" * 40,
        b"../../.git/annex/objects/a/b/MD5E-s5--" + b"0" * 64,
        b"../../.git/annex/objects/a/b/MD5E-s5--" + b"0" * 32 + b"/../../../x",
        b"../../.git/annex/objects/a/b/MD5E--" + b"0" * 32,
        b"\xff\xfe",
        b"",
    ],
)  # fmt: skip
def test_answers_that_are_no_key(server: FaultyServer, tmp_path: Path, text: bytes) -> None:
    server.files["keys/" + SOULS] = text
    with pytest.raises(InputError, match=r"keys/derivative/TextGrids/souls\.TextGrid: expected a git-annex link"):
        fetch(server, tmp_path)
    assert set(on_disk(tmp_path)) == {RESPDICT}


def test_lookups_survive_temporary_faults(server: FaultyServer, tree: dict[str, bytes], tmp_path: Path) -> None:
    key = "keys/" + response_path("UTS03", "souls")
    server.acts = {
        f"keys/{RESPDICT}": [cut(10), drop],
        key: [answer(500), answer(503, Retry_After=0), cut(20)],
        "keys/" + SOULS: [cut(5, hangs=True), answer(429, Retry_After=0)],
    }
    fetch(server, tmp_path)
    assert (tmp_path / SOULS).read_bytes() == tree[SOULS]
    assert server.n_requests(key) == 4


@pytest.mark.parametrize("path", [RESPDICT, SOULS])
@pytest.mark.parametrize(("act", "reason"), [(answer(403), "answered 403"), (drop, "4 times in a row")])
def test_lookups_that_fail(server: FaultyServer, tmp_path: Path, path: str, act: Act, reason: str) -> None:
    server.always[f"keys/{path}"] = act
    message = rf"keys/{path}: .*{reason}.*; run the same command again to resume$"
    with pytest.raises(InputError, match=message) as caught:
        fetch(server, tmp_path)
    assert str(caught.value).count("run the same") == 1
    server.behave()
    assert fetch(server, tmp_path).n_files == 7


def test_two_fetches_into_one_folder(server: FaultyServer, tmp_path: Path) -> None:
    with filelock.FileLock(tmp_path / LOCK), pytest.raises(InputError, match="another fetch is running"):
        fetch(server, tmp_path)


def test_a_file_where_the_folder_should_be(server: FaultyServer, tmp_path: Path) -> None:
    (tmp_path / "derivative").write_text("")
    for folder in (tmp_path, tmp_path / "derivative"):
        with pytest.raises(InputError, match=r"derivative.*cannot be read or written"):
            fetch(server, folder)


def test_a_folder_that_may_not_be_written(server: FaultyServer, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match=r"cannot be read or written \(Permission denied"):
        fetch(server, tmp_path)


def test_certificates_are_verified(tmp_path: Path) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs the program openssl to make a certificate")
    pem = [str(tmp_path / "key.pem"), str(tmp_path / "cert.pem")]
    options = ["-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "2"]
    subprocess.run([openssl, "req", *options, "-keyout", pem[0], "-out", pem[1]], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem[1], pem[0])
    with FaultyServer() as faulty:
        faulty.server.socket = context.wrap_socket(faulty.server.socket, server_side=True)
        url = faulty.url.replace("http:", "https:")
        error = r"the server's certificate is not valid \("
        with http_client.Client(1) as client, pytest.raises(http_client.PermanentError, match=error):
            http_client.read_small(client, url)
    assert faulty.requests == []


def test_no_thread_is_left(server: FaultyServer, tmp_path: Path) -> None:
    before = set(threading.enumerate())
    fetch(server, tmp_path)
    ours = [thread for thread in set(threading.enumerate()) - before if "process_request" not in thread.name]
    assert ours == []

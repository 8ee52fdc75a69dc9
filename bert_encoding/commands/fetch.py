"""The command ``fetch``: download what a study needs from a public data set."""

import shlex
from pathlib import Path
from typing import Any

from bert_encoding.core.command_line import Names, Text, console_of_command, print_lines
from bert_encoding.core.errors import InputError
from bert_encoding.datasets.fetching.lebel2023 import fetch_lebel2023


def fetch(
    dataset: str,
    /,
    *,
    subjects: Names = None,
    to: Text = None,
    stories: Names = None,
    base_url: Text = None,
    keys_url: Text = None,
) -> int:
    """Download what a study needs from a public data set, with checksums; the same command resumes an interrupted
    download.

    Parameters
    ----------
    dataset
        lebel2023: OpenNeuro ds003020, listeners UTS01 to UTS09 (CC0).
    subjects
        Whose responses.
    to
        The folder to put them in.
    stories
        Which stories. [default: all that a subject heard]
    base_url
        URL of the files. [default: the public object storage]
    keys_url
        URL of their checksums. [default: the data set's public git repository]
    """
    if dataset != "lebel2023":
        raise InputError(f"no data set {dataset!r} to fetch; there is lebel2023")
    if not subjects:
        raise InputError("fetch: name the subjects, as in --subjects UTS03")
    if to is None:
        raise InputError("fetch: name the folder, as in --to DIR")
    options: dict[str, Any] = {"base_url": base_url, "keys_url": keys_url}
    urls = {name: url for name, url in options.items() if url is not None}
    console = console_of_command()
    fetched = fetch_lebel2023(list(subjects), Path(to), list(stories) if stories else None, console=console, **urls)
    print_lines(
        console,
        f"{fetched.n_files} files are in {to}, {fetched.n_already_there} of them were there before",
        f"next: python -m bert_encoding check {shlex.quote(to)}",
    )
    return 0

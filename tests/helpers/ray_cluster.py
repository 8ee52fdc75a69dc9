"""A Ray cluster that somebody else started, with a token."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from study_process import environment_of, running_from, short_folder


class Cluster(NamedTuple):
    """A head that ``ray start`` began; its folder takes the place of the machine's temporary folder."""

    address: str
    token: Path
    folder: Path


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A real head with 3 CPUs and a token, ended by its process ids."""
    folder = short_folder()
    token = folder / "auth_token"
    token.touch(mode=0o600)
    token.write_text("0123456789abcdef" * 4)
    variables = environment_of(folder) | {"RAY_TMPDIR": str(folder)}
    variables |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    ray = Path(sys.executable).with_name("ray")
    options = ["--num-cpus=3", "--include-dashboard=false", "--disable-usage-stats", "--object-store-memory=100000000"]
    subprocess.run(
        [ray, "start", "--head", "--port=0", "--min-worker-port=0", "--max-worker-port=0", *options],
        env=variables, check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    yield Cluster((folder / "ray" / "ray_current_cluster").read_text().strip(), token, folder)
    for process in running_from(folder):
        process.kill()
    shutil.rmtree(folder, ignore_errors=True)

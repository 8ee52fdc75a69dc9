"""One small object that is written only if it is still what the writer last saw: what a lock on object storage needs.

pyarrow has no conditional writes, so the requests are made here: on S3 with boto3 (``If-None-Match``, ``If-Match``), on
Google Cloud Storage through its JSON interface (``ifGenerationMatch``). Both services decide such a write atomically.
"""

import json
import time
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple, Protocol
from urllib.parse import parse_qs, quote

from bert_encoding.core.errors import InputError
from bert_encoding.core.storage import ObjectPath, arrow_path, explain

CLUSTER_EXTRA = "pip install 'bert-encoding-study[cluster]'"
PRECONDITION_FAILED, CONFLICT, NOT_FOUND = 412, 409, 404
N_TRIES = 4  # of a write that another one crossed (409)


class Found(NamedTuple):
    """An object as it was read: its content, its version's tag, and its age by the storage's own clock."""

    content: bytes
    tag: str
    age_s: float


class Conditional(Protocol):
    """One object; a write names the tag of the version it replaces, None where there may be none."""

    def write(self, content: bytes, tag: str | None) -> str | None:
        """Write and return the new tag; None if the object is not in that state."""

    def read(self) -> Found | None:
        """Return the object, None if there is none."""

    def delete(self, tag: str) -> None:
        """Delete the object if it still has this tag."""


def conditional(place: ObjectPath) -> Conditional:
    """Return the means to write one object conditionally.

    Raises
    ------
    InputError
        if the package that it needs is not installed.
    """
    return S3Object(place) if place.bucket.startswith("s3:") else GcsObject(place)


class S3Object:
    """An object on S3, or on a service that speaks its language."""

    def __init__(self, place: ObjectPath) -> None:
        try:
            import boto3
            from botocore.config import Config
        except ImportError:
            raise InputError(f"{place}: needs boto3 for the lock; {CLUSTER_EXTRA}") from None
        given = {name: values[-1] for name, values in parse_qs(place.query).items()}
        endpoint = given.get("endpoint_override")
        if endpoint and "://" not in endpoint:
            endpoint = f"{given.get('scheme', 'https')}://{endpoint}"
        settings: dict[str, Any] = {"retries": {"mode": "standard", "max_attempts": 5}}
        if endpoint:  # as pyarrow addresses it; and other services may not know the newer checksums
            settings |= {"s3": {"addressing_style": "path"}, "request_checksum_calculation": "when_required"}
        self.client = boto3.client(
            "s3", endpoint_url=endpoint, region_name=given.get("region"), config=Config(**settings)
        )
        bucket, _, key = arrow_path(place).partition("/")
        self.place, self.at = place, {"Bucket": bucket, "Key": key}

    def write(self, content: bytes, tag: str | None) -> str | None:
        condition = {"IfNoneMatch": "*"} if tag is None else {"IfMatch": tag}
        for _ in range(N_TRIES):
            status, answer = self._ask("put_object", Body=content, **condition)
            if status != CONFLICT:
                break
            time.sleep(0.2)
        return str(answer["ETag"]) if status < 300 else None

    def read(self) -> Found | None:
        status, answer = self._ask("get_object")
        if status == NOT_FOUND:
            return None
        now = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
        return Found(answer["Body"].read(), answer["ETag"], (now - answer["LastModified"]).total_seconds())

    def delete(self, tag: str) -> None:
        self._ask("delete_object", IfMatch=tag)

    def _ask(self, what: str, **arguments: Any) -> tuple[int, Any]:
        """Return status and answer; what is neither success nor a failed condition is an error."""
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            answer = getattr(self.client, what)(**self.at, **arguments)
        except ClientError as error:
            status = error.response["ResponseMetadata"]["HTTPStatusCode"]
            code = error.response["Error"]["Code"]
            if code == "NoSuchBucket" or status not in (PRECONDITION_FAILED, CONFLICT, NOT_FOUND):
                raise explain(self.place, f"{code}: {error}") from error
            return status, None
        except BotoCoreError as error:
            raise explain(self.place, f"{type(error).__name__}: {error}") from error
        return answer["ResponseMetadata"]["HTTPStatusCode"], answer


class GcsObject:
    """An object on Google Cloud Storage; the tag is its generation, which is 0 where there is none."""

    def __init__(self, place: ObjectPath) -> None:
        import urllib3

        given = {name: values[-1] for name, values in parse_qs(place.query).items()}
        host = f"{given.get('scheme', 'https')}://{given.get('endpoint_override', 'storage.googleapis.com')}"
        bucket, _, key = arrow_path(place).partition("/")
        self.place = place
        self.key, self.upload = key, f"{host}/upload/storage/v1/b/{bucket}/o?uploadType=multipart"
        self.object = f"{host}/storage/v1/b/{bucket}/o/{quote(key, safe='')}"
        self.pool = urllib3.PoolManager(retries=urllib3.Retry(5, backoff_factor=0.5, raise_on_status=False))
        self.credentials = None if place.bucket.startswith("gs://anonymous@") else _google_credentials(place)

    def write(self, content: bytes, tag: str | None) -> str | None:
        for _ in range(N_TRIES):
            answer = self._ask("POST", f"{self.upload}&ifGenerationMatch={tag or 0}", content)
            if answer.status != CONFLICT:
                break
            time.sleep(0.2)
        if answer.status == NOT_FOUND:
            raise explain(self.place, "NO_SUCH_BUCKET")
        return str(answer.json()["generation"]) if answer.status < 300 else None

    def read(self) -> Found | None:
        about = self._ask("GET", self.object)
        if about.status == NOT_FOUND:
            return None
        told = about.json()
        content = self._ask("GET", f"{self.object}?alt=media&generation={told['generation']}")
        if content.status == NOT_FOUND:  # replaced in between
            return self.read()
        age = parsedate_to_datetime(about.headers["date"]) - datetime.fromisoformat(told["updated"])
        return Found(content.data, str(told["generation"]), age.total_seconds())

    def delete(self, tag: str) -> None:
        self._ask("DELETE", f"{self.object}?ifGenerationMatch={tag}")

    def _ask(self, method: str, url: str, content: bytes | None = None) -> Any:
        """Send a request; content goes as the second of two parts, the first of which names the object."""
        import urllib3

        body, headers = None, {}
        if content is not None:
            parts = (json.dumps({"name": self.key}).encode(), content)
            body = b"".join(b"--part\r\nContent-Type: application/json\r\n\r\n" + part + b"\r\n" for part in parts)
            body, headers = body + b"--part--\r\n", {"Content-Type": "multipart/related; boundary=part"}
        try:
            answer = self.pool.request(method, url, headers=headers | self._authorisation(), body=body)
        except urllib3.exceptions.HTTPError as error:
            raise explain(self.place, f"Could not connect: {error}") from error
        if answer.status < 300 or answer.status in (PRECONDITION_FAILED, CONFLICT):
            return answer
        if answer.status == NOT_FOUND and "bucket does not exist" not in answer.data.decode(errors="replace"):
            return answer
        raise explain(self.place, f"HTTP status {answer.status}: {answer.data.decode(errors='replace')[:300]}")

    def _authorisation(self) -> dict[str, str]:
        headers: dict[str, str] = {}
        if self.credentials is not None:
            import google.auth.transport.urllib3

            self.credentials.before_request(
                google.auth.transport.urllib3.Request(self.pool), "GET", self.object, headers
            )
        return headers


def _google_credentials(place: ObjectPath) -> Any:
    try:
        import google.auth
    except ImportError:
        raise InputError(f"{place}: needs google-auth for the lock; {CLUSTER_EXTRA}") from None
    try:
        return google.auth.default(scopes=["https://www.googleapis.com/auth/devstorage.read_write"])[0]
    except google.auth.exceptions.DefaultCredentialsError as error:
        raise explain(place, f"no credentials: {error}") from None

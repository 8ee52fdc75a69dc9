"""An object that is written only if it is still the version that the writer last read: the basis of a lock.

pyarrow has no conditional writes, hence boto3 on S3 (``If-None-Match``, ``If-Match``), and the JSON interface of Google
Cloud Storage (``ifGenerationMatch``). Both services decide such a write atomically.
"""

import json
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple
from urllib.parse import parse_qs, quote

import urllib3

from bert_encoding.core.errors import InputError
from bert_encoding.core.storage import ObjectPath, arrow_path, explain

CLUSTER_EXTRA = "pip install 'bert-encoding-study[cluster]'"
PRECONDITION_FAILED, CONFLICT, NOT_FOUND = 412, 409, 404  # conflict: another write at the same time


class StoredVersion(NamedTuple):
    """The content of an object, the tag of its version, and its age by the clock of the storage."""

    content: bytes
    tag: str
    age_s: float


class _StoredObject:
    """Bucket, key and settings of a place."""

    def __init__(self, place: ObjectPath) -> None:
        self.place = place
        self.bucket, _, self.key = arrow_path(place).partition("/")
        self.settings = {name: values[-1] for name, values in parse_qs(place.query).items()}


class S3Object(_StoredObject):
    """An object on S3, or on a service with the same interface; the tag of a version is its ETag."""

    def __init__(self, place: ObjectPath) -> None:
        super().__init__(place)
        try:
            import boto3
            from botocore.config import Config
        except ImportError:
            raise InputError(f"{place}: needs boto3 for the lock; {CLUSTER_EXTRA}") from None
        endpoint = self.settings.get("endpoint_override")
        if endpoint and "://" not in endpoint:
            endpoint = f"{self.settings.get('scheme', 'https')}://{endpoint}"
        options: dict[str, Any] = {"retries": {"mode": "standard", "max_attempts": 5}}
        if endpoint:  # addressed as by pyarrow; other services may not support the newer checksums
            options |= {"s3": {"addressing_style": "path"}, "request_checksum_calculation": "when_required"}
        self.client = boto3.client(
            "s3", endpoint_url=endpoint, region_name=self.settings.get("region"), config=Config(**options)
        )

    def write(self, content: bytes, tag: str | None) -> str | None:
        """Replace the version with this tag (None: create the object); return the new tag, or None without success."""
        condition = {"IfNoneMatch": "*"} if tag is None else {"IfMatch": tag}
        response = self._request("put_object", Body=content, **condition)
        return str(response["ETag"]) if response else None

    def read(self) -> StoredVersion | None:
        """Return the object, None if there is none."""
        response = self._request("get_object")
        if response is None:
            return None
        now = parsedate_to_datetime(response["ResponseMetadata"]["HTTPHeaders"]["date"])
        age_s = (now - response["LastModified"]).total_seconds()
        return StoredVersion(response["Body"].read(), response["ETag"], age_s)

    def delete(self, tag: str) -> None:
        """Delete the object if it still has this tag."""
        self._request("delete_object", IfMatch=tag)

    def _request(self, operation: str, **arguments: Any) -> Any:
        """Return the response, None if a condition was not met or there is no object."""
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            return getattr(self.client, operation)(Bucket=self.bucket, Key=self.key, **arguments)
        except ClientError as error:
            status = error.response["ResponseMetadata"]["HTTPStatusCode"]
            code = error.response["Error"]["Code"]
            if code == "NoSuchBucket" or status not in (PRECONDITION_FAILED, CONFLICT, NOT_FOUND):
                raise explain(self.place, f"{code}: {error}") from error
            return None
        except BotoCoreError as error:
            raise explain(self.place, f"{type(error).__name__}: {error}") from error


class GcsObject(_StoredObject):
    """An object on Google Cloud Storage; the tag is its generation, which is 0 if there is none."""

    def __init__(self, place: ObjectPath) -> None:
        super().__init__(place)
        endpoint = self.settings.get("endpoint_override", "storage.googleapis.com")
        self.host = f"{self.settings.get('scheme', 'https')}://{endpoint}"
        self.url = f"{self.host}/storage/v1/b/{self.bucket}/o/{quote(self.key, safe='')}"
        self.pool = urllib3.PoolManager(retries=urllib3.Retry(5, backoff_factor=0.5, raise_on_status=False))
        self.credentials = None if place.bucket.startswith("gs://anonymous@") else _google_credentials(place)

    def write(self, content: bytes, tag: str | None) -> str | None:
        """Do as `S3Object.write`."""
        parts = (json.dumps({"name": self.key}).encode(), content)
        body = b"".join(b"--part\r\nContent-Type: application/json\r\n\r\n" + part + b"\r\n" for part in parts)
        url = f"{self.host}/upload/storage/v1/b/{self.bucket}/o?uploadType=multipart&ifGenerationMatch={tag or 0}"
        response = self._request("POST", url, body + b"--part--\r\n")
        if response.status == NOT_FOUND:
            raise explain(self.place, "NO_SUCH_BUCKET")
        return str(response.json()["generation"]) if response.status < 300 else None

    def read(self) -> StoredVersion | None:
        """Return the object, None if there is none."""
        response = self._request("GET", self.url)
        if response.status == NOT_FOUND:
            return None
        metadata = response.json()
        content = self._request("GET", f"{self.url}?alt=media&generation={metadata['generation']}")
        if content.status == NOT_FOUND:  # replaced in between
            return self.read()
        age = parsedate_to_datetime(response.headers["date"]) - datetime.fromisoformat(metadata["updated"])
        return StoredVersion(content.data, str(metadata["generation"]), age.total_seconds())

    def delete(self, tag: str) -> None:
        """Delete the object if it still has this tag."""
        self._request("DELETE", f"{self.url}?ifGenerationMatch={tag}")

    def _request(self, method: str, url: str, body: bytes | None = None) -> Any:
        headers = {"Content-Type": "multipart/related; boundary=part"} if body else {}
        try:
            response = self.pool.request(method, url, headers=headers | self._authorisation(), body=body)
        except urllib3.exceptions.HTTPError as error:
            raise explain(self.place, f"Could not connect: {error}") from error
        if response.status < 300 or response.status in (PRECONDITION_FAILED, CONFLICT):
            return response
        text = response.data.decode(errors="replace")
        if response.status == NOT_FOUND and "bucket does not exist" not in text:
            return response
        raise explain(self.place, f"HTTP status {response.status}: {text[:300]}")

    def _authorisation(self) -> dict[str, str]:
        headers: dict[str, str] = {}
        if self.credentials is not None:
            from google.auth.transport.urllib3 import Request

            self.credentials.before_request(Request(self.pool), "GET", self.url, headers)
        return headers


ConditionalObject = S3Object | GcsObject


def conditional_object(place: ObjectPath) -> ConditionalObject:
    """Return the object at a place; raise InputError if the package that it needs is not installed."""
    return S3Object(place) if place.bucket.startswith("s3:") else GcsObject(place)


def _google_credentials(place: ObjectPath) -> Any:
    try:
        import google.auth
    except ImportError:
        raise InputError(f"{place}: needs google-auth for the lock; {CLUSTER_EXTRA}") from None
    try:
        return google.auth.default(scopes=["https://www.googleapis.com/auth/devstorage.read_write"])[0]
    except google.auth.exceptions.DefaultCredentialsError as error:
        raise explain(place, f"no credentials: {error}") from None

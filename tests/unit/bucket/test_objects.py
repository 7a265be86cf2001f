"""One bucket, on moto's server: conditions, tries, and what its errors say."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import xxhash

from raydist.bucket import objects
from raydist.bucket.check import check_bucket
from raydist.bucket.mirror import object_of, place_of
from raydist.bucket.objects import Bucket, Changed, Exists, Missing, Version
from raydist.cluster import checks
from raydist.cluster.doctor import first_facts, unseen_probes
from raydist.errors import JobError, StorageError
from tests import s3


@pytest.fixture(params=["s3", "local"])
def bucket(request: pytest.FixtureRequest, storage: Path, tmp_path: Path) -> Bucket:
    """On the server, and obstore's own store in a folder."""
    if request.param == "local":
        (tmp_path / "store").mkdir()
        return Bucket(f"file://{tmp_path / 'store'}")
    place = object_of(storage)
    assert place is not None
    return place.bucket


def test_of_two_who_create_one_succeeds(bucket: Bucket, tmp_path: Path) -> None:
    key = f"{tmp_path.name}/one"
    made: list[bytes] = []

    def create(content: bytes) -> None:
        try:
            bucket.create(key, content)
        except Exists:
            return
        made.append(content)

    threads = [threading.Thread(target=create, args=(str(i).encode(),)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [bucket.get(key)[0]]


def test_of_two_who_replace_one_version_one_succeeds(bucket: Bucket, tmp_path: Path) -> None:
    key = f"{tmp_path.name}/one"
    first = bucket.create(key, b"1")
    if bucket.uri.startswith("file"):
        with pytest.raises(StorageError, match="cannot do this"):
            bucket.replace(key, b"2", first)
        return
    second = bucket.replace(key, b"2", first)
    with pytest.raises(Changed):
        bucket.replace(key, b"3", first)
    assert bucket.get(key) == (b"2", second)
    with pytest.raises(Changed):
        bucket.replace(f"{tmp_path.name}/none", b"3", first)


def test_what_is_not_there(bucket: Bucket, tmp_path: Path) -> None:
    key = f"{tmp_path.name}/none"
    with pytest.raises(Missing):
        bucket.get(key)
    assert bucket.head(key) is None
    bucket.delete(key)
    assert bucket.listed(f"{key}/") == []


def test_listing(bucket: Bucket, tmp_path: Path) -> None:
    names = [f"{tmp_path.name}/{name}" for name in ("a", "b/1", "b/2", "c")]
    for name in names:
        bucket.put(name, name.encode())
    if bucket.uri.startswith("s3"):
        bucket.put(f"{tmp_path.name}/b", b"")  # as other tools mark a folder
    listed = bucket.listed(f"{tmp_path.name}/")
    assert [each.key for each in listed] == names
    assert [each.size for each in listed] == [len(name) for name in names]
    assert [each.key for each in bucket.listed(f"{tmp_path.name}/", after=names[1])] == names[2:]
    folders, here = bucket.children(f"{tmp_path.name}/")
    assert folders == ["b"] and [each.key for each in here] == [names[0], names[3]]


def test_large_files_go_in_parts_and_come_back(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "MULTIPART_BYTES", 2**20)
    monkeypatch.setattr(objects, "CHUNK_BYTES", 5 * 2**20)
    content = os.urandom(12_000_000)
    (tmp_path / "file").write_bytes(content)
    bucket.put(f"{tmp_path.name}/large", tmp_path / "file")
    hash_ = xxhash.xxh3_128(b"of an earlier try")
    assert bucket.download(f"{tmp_path.name}/large", tmp_path / "back", hash_) == len(content)
    assert (tmp_path / "back").read_bytes() == content
    assert hash_.digest() == xxhash.xxh3_128_digest(content)


def test_every_operation_survives_a_store_that_breaks_a_third_of_the_requests(
    server: int, storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "LEAST_WAIT", 0.001)
    monkeypatch.setattr(objects, "MOST_WAIT", 0.01)
    monkeypatch.setattr(objects, "TRIES", 20)
    monkeypatch.setattr(objects, "retried", {})
    faults = s3.Faults(1 / 3, seed=1)
    with s3.faulty(server, faults) as port:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        bucket = Bucket(f"s3://{s3.BUCKET}")
        for number in range(10):
            key, content = f"{tmp_path.name}/{number:02d}", os.urandom(1000 * number)
            first = bucket.create(key, content)
            with pytest.raises(Exists):
                bucket.create(key, b"another")
            second = bucket.replace(key, content + b"2", first)
            with pytest.raises(Changed):
                bucket.replace(key, b"another", first)
            assert bucket.get(key) == (content + b"2", second)
            assert bucket.download(key, tmp_path / "file") == len(content) + 1
        keys = [each.key for each in bucket.listed(f"{tmp_path.name}/")]
        assert keys == [f"{tmp_path.name}/{number:02d}" for number in range(10)]
        bucket.delete(*keys[:5])
        assert len(bucket.listed(f"{tmp_path.name}/")) == 5
    assert all(faults.count.values())
    assert sum(objects.retried.values()) >= sum(faults.count.values()) * 0.9


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"uri": "s3://there-is-none/runs"}, "no such bucket"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "the store does not answer"),
    ],
)
def test_a_bucket_that_cannot_be_used_is_refused(
    storage: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, str], says: str
) -> None:
    monkeypatch.setattr(objects, "TRIES", 2)
    uri = change.pop("uri", f"s3://{s3.BUCKET}/runs")
    for name, value in change.items():
        monkeypatch.setenv(name, value)
    objects.open_bucket.cache_clear()
    with pytest.raises(StorageError, match=says) as raised:
        check_bucket(place_of(uri))
    text = str(raised.value)
    assert uri.rpartition("/")[0] in text and "secret-of-the-tests" not in text and "LIST" in text


@pytest.mark.parametrize(
    ("refused", "says"),
    [
        ((403, "AccessDenied", ("PUT", "POST")), "access is denied"),  # keys that may only read
        ((301, "PermanentRedirect", ("GET", "PUT")), "in another region"),
        ((403, "RequestTimeTooSkewed", ("GET", "PUT")), "this machine's clock is wrong"),
        ((403, "InvalidAccessKeyId", ("GET", "PUT")), "does not know the access key"),
        ((501, "NotImplemented", ("PUT",)), "the store cannot do this"),
    ],
)
def test_a_refusal_is_told_at_once_with_its_request(
    server: int, storage: Path, monkeypatch: pytest.MonkeyPatch, refused: Any, says: str
) -> None:
    methods = refused[2]
    monkeypatch.setattr(objects, "retried", {})
    with s3.faulty(server, s3.Faults(0, refused=refused)) as port:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        objects.open_bucket.cache_clear()
        with pytest.raises(StorageError, match=says) as raised:
            check_bucket(storage)
    request = "LIST" if "GET" in methods else "PUT if none"
    assert raised.value.where.startswith(f"{request} s3://{s3.BUCKET}/")
    assert "AWSAccessKeyId" not in str(raised.value) and not objects.retried, "trying again would not help"


@pytest.mark.parametrize(
    ("said", "what"),
    [
        ("status code: 403 Forbidden: <Error><Code>AccessDenied</Code></Error>", "access is denied"),
        ("<Code>InvalidAccessKeyId</Code><AWSAccessKeyId>A</AWSAccessKeyId>", "does not know the access key"),
        ("status code: 301 Moved Permanently: <Code>PermanentRedirect</Code>", "in another region"),
        ("<Code>RequestTimeTooSkewed</Code>", "clock is wrong"),
        ("status code: 501: <Code>NotImplemented</Code>", "cannot do this"),
        ("PUT http://169.254.169.254/latest/api/token - status code: 403 Forbidden", "no credentials"),
    ],
)  # fmt: skip
def test_what_stores_say_is_explained(said: str, what: str) -> None:
    assert what in objects.explained(said)[0]


def test_a_bucket_that_can_be_used_is_left_as_it_was(storage: Path) -> None:
    check_bucket(storage)
    place = object_of(storage)
    assert place is not None and place.bucket.listed(f"{place.key}/") == []


def test_a_store_without_conditions_is_refused(storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def put(self: Bucket, key: str, content: bytes, version: Version | None = None) -> Version:
        return self.put(key, content)

    monkeypatch.setattr(Bucket, "create", put)
    with pytest.raises(StorageError, match="no conditional writes"):
        check_bucket(storage)
    monkeypatch.undo()


@pytest.mark.parametrize(
    "uri", ["ftp://host/runs", "s3://", "s3:///runs", "s3://bucket/../other", "s3://bucket/a?b=c"]
)
def test_a_uri_that_cannot_hold_runs_is_refused(uri: str) -> None:
    with pytest.raises(JobError, match="no place for runs"):
        place_of(uri)


def test_the_doctor_says_of_each_node_whether_it_can_use_the_bucket(
    storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes: dict[str, dict[str, object]] = {
        name: {**first_facts(name, str(place), "probe-", []), **unseen_probes(name, str(place), "probe-", {})}
        for name, place in {"one": storage, "two": place_of("s3://there-is-none/runs")}.items()
    }
    (found,) = checks.storage(str(storage), nodes, "one")
    assert not found.ok and found.where == "two"
    assert "there is no such bucket" in found.what and "credentials" in found.fix
    (good,) = checks.storage(str(storage), {"one": nodes["one"]}, "one")
    assert good.ok and good.what.startswith(f"storage s3://{s3.BUCKET}/")


def test_credentials_come_from_the_files_of_aws_too(
    storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
        monkeypatch.delenv(name)
    (tmp_path / "credentials").write_text("[default]\naws_access_key_id = a\naws_secret_access_key = b\n")
    (tmp_path / "config").write_text("[default]\nregion = us-east-1\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    bucket = Bucket(f"s3://{s3.BUCKET}")
    bucket.put(f"{tmp_path.name}/one", b"1")
    assert bucket.get(f"{tmp_path.name}/one")[0] == b"1"

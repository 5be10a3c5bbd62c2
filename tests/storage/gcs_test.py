"""What a bucket answers is told in seconds and in one line; what it holds is read as it is or not at all."""

import functools
import re
import time

import fsspec.config
import pytest

from mae_jax.errors import UserError
from mae_jax.storage import gcs as storage_gcs
from mae_jax.storage import paths
from mae_jax.storage.gcs import BucketError, GenerationMismatch, StoredObject

RUN = "gs://bucket/some/run"


@pytest.fixture
def fresh(monkeypatch):
    """A client that is made by what the environment says now."""
    client = functools.cache(storage_gcs._client.__wrapped__)
    monkeypatch.setattr(storage_gcs, "_client", client)
    yield
    client()._http.close()


@pytest.mark.parametrize(("fault", "words"), [
    ({"status": 403}, "access denied (a fault of the test); the account needs roles/storage.objectAdmin on gs://bucket"),
    ({"status": 401}, "no valid credentials (none were found); run: gcloud auth application-default login"),
    ({"status": 503}, "gs://bucket answers with 503: a fault of the test"),
    ({"kind": "reset"}, "gs://bucket cannot be reached (ConnectionError"),
    ({"kind": "slow", "seconds": 3.0}, "no answer within 1 s; is there a network"),
])
def test_a_bucket_that_cannot_be_looked_into_is_told_in_seconds_with_the_path_and_a_hint(gcs, monkeypatch, fault,
                                                                                         words):
    monkeypatch.setattr(storage_gcs, "CHECK_SECONDS", 1.0)
    gcs.add({"path": "some/run", "times": -1, **fault})
    began = time.monotonic()
    with pytest.raises(UserError) as error:
        paths.locate(RUN)
    assert time.monotonic() - began < 2
    assert f"{RUN}: {words}" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_bucket_is_told_with_the_command_that_makes_it(gcs):
    with pytest.raises(UserError, match=r"gs://bukket/run: .*gcloud storage buckets create gs://bukket"):
        paths.locate("gs://bukket/run")


def test_a_short_burst_is_waited_for(gcs):
    gcs.add({"path": "some/run", "status": 503}, {"path": "some/run", "status": 429}, {"path": "run", "kind": "reset"})
    assert str(paths.locate(RUN)) == RUN


@pytest.mark.usefixtures("gcs", "fresh")
def test_nobody_at_the_address_is_told_in_seconds(monkeypatch):
    monkeypatch.setattr(storage_gcs, "CHECK_SECONDS", 1.0)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"gs://bucket .*Connection refused"):
        paths.locate(RUN)


@pytest.mark.usefixtures("fresh")
def test_without_credentials_and_metadata_server_only_public_buckets_can_be_read(gcs, monkeypatch):
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "")
    monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:9")  # nothing listens there
    monkeypatch.delenv("STORAGE_EMULATOR_HOST")
    monkeypatch.setenv("API_ENDPOINT_OVERRIDE", gcs.url)
    assert str(paths.locate(RUN)) == RUN
    gcs.add({"path": "some/run", "status": 401})
    with pytest.raises(UserError, match=r"gs://bucket.*credentials"):
        paths.locate(RUN)


@pytest.mark.parametrize(("name", "value"), [
    ("STORAGE_EMULATOR_HOST", "http://10.0.0.1:4443"), ("TENSORSTORE_GCS_HTTP_URL", "https://example.com"),
    ("TENSORSTORE_GCS_HTTP_URL", "http://storage.googleapis.com"),
    ("API_ENDPOINT_OVERRIDE", "https://storage.googleapis.com@example.com"),
    ("STORAGE_EMULATOR_HOST", "https://googleapis.com.example.com"), ("STORAGE_EMULATOR_HOST", "127.0.0.1.example.com"),
    ("STORAGE_EMULATOR_HOST", "https://evilgoogleapis.com")])
def test_credentials_go_to_google_or_loopback_only(gcs, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"{name}={value}: .*credentials"):
        paths.locate(RUN)
    assert gcs.requests == []


@pytest.mark.parametrize("value", ["https://storage.googleapis.com", "https://storage.europe-west3.rep.googleapis.com",
                                   "http://localhost:4443", "127.0.0.1:4443", "http://[::1]:4443", "http://127.1.2.3"])
def test_googles_addresses_and_loopback_are_trusted(value):
    assert storage_gcs._trusted(value)


@pytest.mark.parametrize("folder", ["s3://bucket/run", "gs:/bucket/run", "file:///run", "gs:bucket"])
def test_a_folder_of_another_scheme_is_refused(folder):
    with pytest.raises(UserError, match=f"{re.escape(folder)}: .*gs://BUCKET/FOLDER"):
        paths.locate(folder)


@pytest.mark.parametrize("folder", ["gs://", "gs:///run", "gs://Bad_Bucket!!/run", "gs://ab/run", "gs://bucket-/run"])
def test_what_cannot_be_the_name_of_a_bucket_is_refused(gcs, folder):
    with pytest.raises(UserError, match=f"{re.escape(folder)}: not a valid .*gs://BUCKET/FOLDER"):
        paths.locate(folder)
    assert gcs.requests == []


@pytest.mark.parametrize("protocol", ["gcs", "gs"])
def test_an_address_in_the_settings_of_fsspec_is_checked_too(gcs, monkeypatch, protocol):
    monkeypatch.setitem(fsspec.config.conf, protocol, {"endpoint_url": "http://evil.example:80"})
    with pytest.raises(UserError, match=r"endpoint_url=http://evil\.example:80 .*fsspec"):
        paths.locate(RUN)
    assert gcs.requests == []


def test_another_universe_is_refused(gcs, monkeypatch):
    monkeypatch.setenv("GOOGLE_CLOUD_UNIVERSE_DOMAIN", "evil.example")
    with pytest.raises(UserError, match=r"GOOGLE_CLOUD_UNIVERSE_DOMAIN=evil\.example: .*credentials"):
        paths.locate(RUN)
    assert gcs.requests == []


def test_a_name_that_is_a_pattern_is_refused(gcs):
    with pytest.raises(UserError, match=r"gs://bucket/run\[1\]: .* \[ \],"):
        paths.locate("gs://bucket/run[1]")
    assert gcs.requests == []


def test_that_an_object_is_not_there_is_asked_again_where_the_answer_was_cut(gcs):
    gcs.add({"path": "nothing", "kind": "cut"})
    assert storage_gcs.read(f"{RUN}/nothing") is None
    assert gcs.faults[0].done


def test_an_object_is_written_and_read_through_bursts_resets_lost_answers_and_a_flipped_bit(gcs):
    path, content = f"{RUN}/burst", bytes(range(256)) * 10
    for fault in ({"status": 503}, {"kind": "reset"}, {"kind": "lost"}):
        gcs.add({"path": "burst", "method": "POST", **fault})
    generation = storage_gcs.write(path, content)
    for fault in ({"kind": "flip"}, {"status": 429}, {"kind": "cut"}):
        gcs.add({"path": "burst", "method": "GET", **fault})
    assert storage_gcs.read(path) == StoredObject(content, generation)
    assert storage_gcs.read(f"{RUN}/none") is None


def test_a_body_that_stays_damaged_is_an_error_that_says_so(gcs):
    storage_gcs.write(f"{RUN}/flipped", b"content")
    gcs.add({"path": "flipped", "method": "GET", "kind": "flip", "times": -1})
    with pytest.raises(BucketError, match=r"checksum, twice"):
        storage_gcs.read(f"{RUN}/flipped")


def test_an_object_gives_way_to_the_next_on_its_condition_only(gcs):
    path = f"{RUN}/condition"
    first = storage_gcs.write(path, b"1", generation=0)
    with pytest.raises(GenerationMismatch):
        storage_gcs.write(path, b"2", generation=0)
    second = storage_gcs.write(path, b"2", generation=first)
    with pytest.raises(GenerationMismatch):
        storage_gcs.delete(path, first, 3)
    storage_gcs.delete(path, second, 3)
    storage_gcs.delete(path, second, 3)
    assert storage_gcs.read(path) is None


def test_what_cannot_be_written_is_given_up_in_time(gcs):
    gcs.add({"path": "outage", "method": "POST", "status": 503, "times": -1})
    began = time.monotonic()
    with pytest.raises(BucketError, match=r"outage: gs://bucket .*503"):
        storage_gcs.write(f"{RUN}/outage", b"", 1.0)
    assert time.monotonic() - began < 2

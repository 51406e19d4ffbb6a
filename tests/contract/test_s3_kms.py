"""Encryption with a KMS key, against moto: a mock, for the server of the other tests has no KMS.

moto encrypts nothing. It takes the headers, remembers them with the object, and gives them back,
and that is what is tested: that they go with each way of writing, and that reading needs none.
"""

from collections.abc import Iterator
from typing import Any

import boto3
import numpy as np
import pytest
from moto import mock_aws

from tiered.config import MIB, S3
from tiered.s3 import S3Store

BUCKET, KEY = "encrypted", "arn:aws:kms:eu-west-1:123456789012:key/0a1b2c3d"
IMAGE = np.random.default_rng(4).integers(0, 256, 11 * MIB, np.uint8)  # three parts


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "mock")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    with mock_aws():
        client = boto3.client("s3", region_name="us-east-1")
        client.create_bucket(Bucket=BUCKET)
        yield client


def test_everything_that_is_written_is_encrypted_with_the_key(client: Any) -> None:
    s3 = S3(f"s3://{BUCKET}", encryption="aws:kms", kms_key_id=KEY, part_bytes=5 * MIB)
    store = S3Store(s3, "job")
    store.upload("large", [[IMAGE[: 7 * MIB], IMAGE[7 * MIB :]]])
    store.upload("small", [[IMAGE[:100]]])
    assert store.create("claim", b"mine")
    for key in ("large", "small", "claim"):
        head = client.head_object(Bucket=BUCKET, Key=f"job/{key}")
        assert (head["ServerSideEncryption"], head["SSEKMSKeyId"]) == ("aws:kms", KEY)
    assert store.read("large", 0, IMAGE.size) == IMAGE.data
    assert store.get("claim") == b"mine"
    assert store.sizes("") == {"claim": 4, "large": IMAGE.size, "small": 100}
    store.close()

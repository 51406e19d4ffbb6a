"""s3torchconnector: DCP's storage writer and reader for S3, against a server on this machine."""

import os
from typing import Any

import boto3
from botocore.config import Config
from s3torchconnector import S3ClientConfig
from s3torchconnector.dcp import S3StorageReader, S3StorageWriter

from benchmarks.peers.adapter import Tensors
from benchmarks.peers.dcp import Dcp

BUCKET = "benchmarks"


class S3Connector(Dcp):
    """See Adapter."""

    def open(self, tensors: Tensors, folder: str, rank: int, ranks: int) -> None:
        """See Adapter."""
        super().open(tensors, folder, rank, ranks)
        self._region = os.environ["AWS_REGION"]
        self._config = S3ClientConfig(force_path_style=True)

    def forget(self, step: int) -> None:
        """See Adapter."""
        if self._rank:
            return
        path_style = Config(s3={"addressing_style": "path"}, proxies={})
        objects = boto3.resource("s3", config=path_style).Bucket(BUCKET).objects
        objects.filter(Prefix=f"step-{step}/").delete()

    def _writer(self, step: int) -> Any:
        return S3StorageWriter(self._region, self._uri(step), s3client_config=self._config)

    def _reader(self, step: int) -> Any:
        return S3StorageReader(self._region, self._uri(step), s3client_config=self._config)

    def _uri(self, step: int) -> str:
        return f"s3://{BUCKET}/step-{step}/"

"""Objects by URI: on S3, and in files of this machine. `s3.py` is the only importer of boto3."""

from phi4ray.storage.base import TEMPORARY, ObjectInfo, Storage, Writer
from phi4ray.storage.copy import copy_tree, upload_tree
from phi4ray.storage.uris import expand, join, normal, storage_for

__all__ = [
    "TEMPORARY",
    "ObjectInfo",
    "Storage",
    "Writer",
    "copy_tree",
    "expand",
    "join",
    "normal",
    "storage_for",
    "upload_tree",
]

"""Files in a folder or an object store, by an address.

An address is a path or a URL that pyarrow or fsspec supports: s3://bucket/prefix, gs://..., file:///...
"""

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from shutil import copyfileobj
from typing import Any
from uuid import uuid4

from umbrella.base import mask_secrets

CHUNK = 2**22
"""Bytes per read and write."""
TIMEOUT, TRIES = 10, 3
"""Seconds without data until a request to S3 or GCS fails, and the number of tries. pyarrow waits for minutes."""


def is_remote(address: str) -> bool:
    """Whether an address is not a local path."""
    return "://" in address and not address.startswith("file://")


def local_path(address: str) -> Path:
    """Return the folder of a path or a file:// URL."""
    return Path(address.removeprefix("file://")).absolute()


class FileStorage:
    """Files by name, such as "sources/0a1b.json". Incomplete files are never visible.

    Any number of machines may read and write at the same time.

    Args:
        address: a path or URL.
        setting: setting with this address, for error messages.

    Raises:
        OSError: the storage cannot be reached, read or written; the message has setting and address.
    """

    def __init__(self, address: str, setting: str = "resources.store") -> None:
        self.address, self.setting = address if is_remote(address) else str(local_path(address)), setting

    def __str__(self) -> str:
        return f"{self.setting}={mask_secrets(self.address)}"

    def download(self, name: str, file: Path, is_complete: Callable[[Path], bool] = lambda partial: True) -> bool:
        """Copy a file of the storage to a local file, which is renamed when it is complete.

        Args:
            is_complete: checks the copy.

        Returns:
            False if the file does not exist or ``is_complete`` returns False.
        """
        filesystem, root = self._filesystem
        partial = file.with_name(f".{file.name}.{uuid4().hex}.partial")
        with self._describe_errors():
            try:
                source = filesystem.open_input_stream(f"{root}/{name}")
            except FileNotFoundError:
                return False
            try:
                with source, partial.open("xb") as target:
                    copyfileobj(source, target, CHUNK)
                if complete := is_complete(partial):  # else it is truncated, and an existing file is kept
                    partial.replace(file)
                return complete
            finally:
                partial.unlink(missing_ok=True)

    def upload(self, name: str, content: Path | bytes) -> None:
        """Copy a local file or bytes to the storage. In a folder, it is renamed when it is complete."""
        filesystem, root = self._filesystem
        path = target = f"{root}/{name}"
        if self._is_folder:
            target = f"{os.path.dirname(path)}/.{uuid4().hex}.partial"
        with self._describe_errors():
            filesystem.create_dir(os.path.dirname(path), recursive=True)
            source = io.BytesIO(content) if isinstance(content, bytes) else content.open("rb")
            with source, filesystem.open_output_stream(target) as stream:
                copyfileobj(source, stream, CHUNK)
            if target != path:
                os.replace(target, path)

    def delete(self, name: str) -> None:
        """Delete a file if it exists, and in a local folder its parent folders if they are empty."""
        filesystem, root = self._filesystem
        with self._describe_errors(), suppress(FileNotFoundError):
            filesystem.delete_file(f"{root}/{name}")
        if self._is_folder:
            with suppress(OSError):
                for folder in list(Path(name).parents)[:-1]:
                    Path(root, folder).rmdir()

    def list_files(self, folder: str) -> dict[str, int]:
        """Return the sizes in bytes of all files below a folder, by name."""
        from pyarrow.fs import FileSelector, FileType

        filesystem, root = self._filesystem
        with self._describe_errors():
            found = filesystem.get_file_info(FileSelector(f"{root}/{folder}", allow_not_found=True, recursive=True))
        return {file.path[len(root) + 1 :]: file.size for file in found if file.type is FileType.File}

    @property
    def _is_folder(self) -> bool:
        return self._filesystem[0].type_name == "local"

    @cached_property
    def _filesystem(self) -> tuple[Any, str]:
        """The pyarrow file system, and the path in it."""
        from pyarrow.fs import FileSystem, FSSpecHandler, LocalFileSystem, PyFileSystem

        if not is_remote(self.address):
            return LocalFileSystem(), self.address
        with self._describe_errors():
            try:
                filesystem, path = FileSystem.from_uri(self.address)
                filesystem = _with_timeouts(filesystem)
            except (ValueError, NotImplementedError):  # a URL scheme that pyarrow does not support
                import fsspec

                other, path = fsspec.core.url_to_fs(self.address)
                filesystem = PyFileSystem(FSSpecHandler(other))
        return filesystem, path.rstrip("/")

    @contextmanager
    def _describe_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # each library raises its own errors
            if isinstance(error, OSError) and error.filename:  # an error of the local disk
                raise
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            message = f"{self}: {mask_secrets(reason)}"
            raise OSError(*filter(None, [getattr(error, "errno", None)]), message) from None

    def __getstate__(self) -> dict[str, Any]:
        return {"address": self.address, "setting": self.setting}  # connections cannot be pickled


def _with_timeouts(filesystem: Any) -> Any:
    """Return a copy of a file system with timeouts, which cannot be set in a URL."""
    from pyarrow.fs import AwsStandardS3RetryStrategy

    limits: dict[str, Any] = {}
    if filesystem.type_name == "s3":
        # Background writes stay in memory until the file is closed.
        limits = {"connect_timeout": TIMEOUT, "request_timeout": TIMEOUT, "background_writes": False}
        limits["retry_strategy"] = AwsStandardS3RetryStrategy(max_attempts=TRIES)
    elif filesystem.type_name == "gcs":
        limits = {"retry_time_limit": timedelta(seconds=TIMEOUT * TRIES)}
    return type(filesystem)(**{**filesystem.__reduce__()[1][0], **limits}) if limits else filesystem

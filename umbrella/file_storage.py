"""A place that machines share: a folder, or an object store by its address.

An address is what pyarrow or fsspec knows: s3://bucket/prefix, gs://..., file:///..., or a plain path.
"""

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any
from uuid import uuid4

from umbrella.base import mask_secrets

CHUNK = 2**22
"""Bytes that are copied at a time."""
PATIENCE, TRIES = 10, 3
"""Seconds without a byte after which S3 or GCS does not answer, and how often it is asked. pyarrow's own: minutes."""


def is_remote(place: str) -> bool:
    """Whether a place is no path of this machine's, where arrays could be read as they lie."""
    return "://" in place and not place.startswith("file://")


def local_path(place: str) -> Path:
    """The folder that a path or a file:// address names."""
    return Path(place.removeprefix("file://")).absolute()


class FileStorage:
    """Files by their name, as "sources/0a1b.json": whole or not there. Any number of machines may fetch and put.

    Args:
        setting: which names the address.

    Raises:
        OSError: it cannot be reached, read or written; names setting and address.
    """

    def __init__(self, address: str, setting: str = "resources.store") -> None:
        self.address, self.setting = address if is_remote(address) else str(local_path(address)), setting

    def __str__(self) -> str:
        return f"{self.setting}={mask_secrets(self.address)}"

    def fetch(self, name: str, to: Path, is_whole: Callable[[Path], bool]) -> bool:
        """Copy a file into a folder of this machine, where it appears whole.

        Returns False where there is none of this name, or ``is_whole`` does not find the copy to be so.
        """
        filesystem, root = self._place
        partial = to.with_name(f".{to.name}.{uuid4().hex}.partial")
        with self._named():
            try:
                source = filesystem.open_input_stream(f"{root}/{name}")
            except FileNotFoundError:
                return False
            try:
                with source, partial.open("xb") as target:
                    while chunk := source.read(CHUNK):
                        target.write(chunk)
                if not is_whole(partial):  # cut short, or still being written: what lies here already may be better
                    return False
                partial.replace(to)
            finally:
                partial.unlink(missing_ok=True)
        return True

    def read(self, name: str) -> bytes | None:
        """What is in a file; None where there is none of this name."""
        filesystem, root = self._place
        with self._named():
            try:
                with filesystem.open_input_stream(f"{root}/{name}") as source:
                    return source.read()
            except FileNotFoundError:
                return None

    def put(self, name: str, file: Path | bytes, copied: Callable[[int], None] = lambda size: None) -> None:
        """Copy a file there, or write bytes. Object stores show it when it is whole; in a folder it gets its name then.

        Args:
            copied: told how many bytes each time that some were.
        """
        from pyarrow.fs import LocalFileSystem

        filesystem, root = self._place
        path = f"{root}/{name}"
        in_folder = isinstance(filesystem, LocalFileSystem)
        first = f"{root}/{os.path.dirname(name)}/.{uuid4().hex}.partial" if in_folder else path
        with self._named():
            filesystem.create_dir(os.path.dirname(path), recursive=True)
            with io.BytesIO(file) if isinstance(file, bytes) else file.open("rb") as source:
                chunk = source.read(CHUNK)  # a file that cannot be read leaves what is there as it is
                with filesystem.open_output_stream(first) as target:
                    while chunk:
                        target.write(chunk)
                        copied(len(chunk))
                        chunk = source.read(CHUNK)
            if in_folder:
                os.replace(first, path)

    def delete(self, name: str) -> None:
        """Delete a file, if it is there; in a folder also the folders that it leaves empty."""
        from pyarrow.fs import LocalFileSystem

        filesystem, root = self._place
        with self._named(), suppress(FileNotFoundError):
            filesystem.delete_file(f"{root}/{name}")
        if isinstance(filesystem, LocalFileSystem):
            with suppress(OSError):
                for folder in list(Path(name).parents)[:-1]:
                    Path(root, folder).rmdir()

    def names(self, folder: str) -> set[str]:
        """The files of a folder of the store."""
        from pyarrow.fs import FileSelector

        filesystem, root = self._place
        with self._named():
            found = filesystem.get_file_info(FileSelector(f"{root}/{folder}", allow_not_found=True))
        return {file.base_name for file in found}

    def sizes(self, folder: str) -> dict[str, int]:
        """The files below a folder of the store, by their names in the store, with their bytes."""
        from pyarrow.fs import FileSelector, FileType

        filesystem, root = self._place
        with self._named():
            found = filesystem.get_file_info(FileSelector(f"{root}/{folder}", allow_not_found=True, recursive=True))
        return {file.path[len(root) + 1 :]: file.size for file in found if file.type is FileType.File}

    @cached_property
    def _place(self) -> tuple[Any, str]:
        """The file system, and the path in it."""
        from pyarrow.fs import FileSystem, FSSpecHandler, LocalFileSystem, PyFileSystem

        if not is_remote(self.address):
            return LocalFileSystem(), self.address
        with self._named():
            try:
                filesystem, path = FileSystem.from_uri(self.address)
                filesystem = _impatient(filesystem)
            except (ValueError, NotImplementedError):  # a scheme that pyarrow itself does not know
                import fsspec

                known, path = fsspec.core.url_to_fs(self.address)
                filesystem = PyFileSystem(FSSpecHandler(known))
        return filesystem, path.rstrip("/")

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # each library has errors of its own
            if isinstance(error, OSError) and error.filename:  # of this machine's disk
                raise
            said = " ".join(str(error).split())[:300] or type(error).__name__
            words = f"{self}: {mask_secrets(said)}"
            raise OSError(*filter(None, [getattr(error, "errno", None)]), words) from None

    def __getstate__(self) -> dict[str, Any]:
        return {"address": self.address, "setting": self.setting}  # connections do not travel


def _impatient(filesystem: Any) -> Any:
    """The same file system, made anew as pickle would, but with limits that addresses cannot hold."""
    import pyarrow.fs as known

    limits: dict[str, Any] = {}
    if filesystem.type_name == "s3":
        # What is written in the background is held in memory, and only sent while the file is closed.
        limits = {"connect_timeout": PATIENCE, "request_timeout": PATIENCE, "background_writes": False}
        limits["retry_strategy"] = known.AwsStandardS3RetryStrategy(max_attempts=TRIES)
    elif filesystem.type_name == "gcs":
        limits = {"retry_time_limit": timedelta(seconds=PATIENCE * TRIES)}
    return type(filesystem)(**{**filesystem.__reduce__()[1][0], **limits}) if limits else filesystem

"""The store behind a node's own: a folder that machines share, or an object store by its address.

An address is what pyarrow or fsspec knows: s3://bucket/prefix, gs://..., file:///..., or a plain path.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any
from uuid import uuid4

from umbrella.base import masked

CHUNK = 2**22
"""Bytes that are copied at a time."""


def is_address(place: str) -> bool:
    """Whether a place is no path of this machine's, where arrays could be read as they lie."""
    return "://" in place and not place.startswith("file://")


def as_path(place: str) -> Path:
    """The folder that a path or a file:// address names."""
    return Path(place.removeprefix("file://")).absolute()


class SharedStore:
    """Files by their name, as "sources/0a1b.json": whole or not there. Any number of machines may fetch and put.

    Raises:
        OSError: it cannot be reached, read or written; names its address.
    """

    def __init__(self, address: str) -> None:
        self.address = address if is_address(address) else str(as_path(address))

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

    def put(self, name: str, file: Path) -> None:
        """Copy a file there. Object stores show one when it is whole; in a folder it gets its name then."""
        from pyarrow.fs import LocalFileSystem

        filesystem, root = self._place
        path = f"{root}/{name}"
        in_folder = isinstance(filesystem, LocalFileSystem)
        first = f"{root}/{os.path.dirname(name)}/.{uuid4().hex}.partial" if in_folder else path
        with self._named():
            filesystem.create_dir(os.path.dirname(path), recursive=True)
            with file.open("rb") as source, filesystem.open_output_stream(first) as target:
                while chunk := source.read(CHUNK):
                    target.write(chunk)
            if in_folder:
                os.replace(first, path)

    def names(self, folder: str) -> set[str]:
        """The files of a folder of the store."""
        from pyarrow.fs import FileSelector

        filesystem, root = self._place
        with self._named():
            found = filesystem.get_file_info(FileSelector(f"{root}/{folder}", allow_not_found=True))
        return {file.base_name for file in found}

    @cached_property
    def _place(self) -> tuple[Any, str]:
        """The file system, and the path in it."""
        from pyarrow.fs import FileSystem, FSSpecHandler, LocalFileSystem, PyFileSystem

        if not is_address(self.address):
            return LocalFileSystem(), self.address
        with self._named():
            try:
                filesystem, path = FileSystem.from_uri(self.address)
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
            words = f"resources.store={masked(self.address)}: {masked(said)}"
            raise OSError(*filter(None, [getattr(error, "errno", None)]), words) from None

    def __getstate__(self) -> dict[str, Any]:
        return {"address": self.address}  # connections do not travel

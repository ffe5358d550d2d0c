"""All that is kept on disk: files and directories that are written whole or not at all, and checked when they are read.

One file: ``write_output`` (``files``) replaces it at once, where that keeps what it is. A directory: ``save_directory``
(``directories``) takes the place of an earlier save and of nothing else. What is in them: ``documents``, ``tensors``,
whose digests tell what was truncated or edited. JSON, safetensors and plain arrays alone are read; nothing is unpickled
or executed.
"""

from bayes_dispatch.storage.directories import (
    CLUTTER,
    EXPORTED_BY,
    FINISHED,
    check_directory,
    read_directory,
    save_directory,
    saved_at,
    write_directory,
)
from bayes_dispatch.storage.documents import digest, expect_digest, expecting, parse_json, read_json, write_json
from bayes_dispatch.storage.files import TEMPORARY, keep_file, read_bytes, write_output
from bayes_dispatch.storage.tensors import check_tensors, parse_tensors, read_tensors, tensors_as_bytes, write_tensors

__all__ = [
    "CLUTTER",
    "EXPORTED_BY",
    "FINISHED",
    "TEMPORARY",
    "check_directory",
    "check_tensors",
    "digest",
    "expect_digest",
    "expecting",
    "keep_file",
    "parse_json",
    "parse_tensors",
    "read_bytes",
    "read_directory",
    "read_json",
    "read_tensors",
    "save_directory",
    "saved_at",
    "tensors_as_bytes",
    "write_directory",
    "write_json",
    "write_output",
    "write_tensors",
]

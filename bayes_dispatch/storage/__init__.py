"""All that is kept on disk: files and directories that are written whole or not at all, and checked when they are read.

One file (``files``): ``write_output`` replaces it at once, where that keeps what it is, and else overwrites it;
``replace_file`` replaces it or refuses, which ``check_replaceable`` tells beforehand. A directory (``directories``):
``save_directory`` takes the place of an earlier save and of nothing else, and ``read_saved`` reads one save, whole.
What is in them: ``documents``, ``tensors``, whose digests tell what was truncated or edited. JSON, safetensors and
plain arrays alone are read; nothing is unpickled or executed.
"""

from bayes_dispatch.storage.directories import (
    CLUTTER,
    EXPORTED_BY,
    FINISHED,
    check_directory,
    check_unused,
    read_directory,
    read_saved,
    save_directory,
    saved_at,
    work_beside,
    write_directory,
)
from bayes_dispatch.storage.documents import digest, expect_digest, expecting, finite, parse_json, read_json, write_json
from bayes_dispatch.storage.files import TEMPORARY, check_replaceable, keep_file, read_bytes, replace_file, write_output
from bayes_dispatch.storage.tensors import check_tensors, parse_tensors, read_tensors, tensors_as_bytes, write_tensors

__all__ = [
    "CLUTTER",
    "EXPORTED_BY",
    "FINISHED",
    "TEMPORARY",
    "check_directory",
    "check_replaceable",
    "check_tensors",
    "check_unused",
    "digest",
    "expect_digest",
    "expecting",
    "finite",
    "keep_file",
    "parse_json",
    "parse_tensors",
    "read_bytes",
    "read_directory",
    "read_json",
    "read_saved",
    "read_tensors",
    "replace_file",
    "save_directory",
    "saved_at",
    "tensors_as_bytes",
    "work_beside",
    "write_directory",
    "write_json",
    "write_output",
    "write_tensors",
]

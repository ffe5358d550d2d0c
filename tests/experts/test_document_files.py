"""Documents from JSON lines: what is written is read, and what is wrong is said with its line."""

import json
from pathlib import Path

import pytest

from bayes_dispatch.errors import ConfigError
from bayes_dispatch.experts.document_files import read_documents
from bayes_dispatch.experts.documents import Document


def test_documents_are_read(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    lines = [
        {"text": "naïve: é", "prompt_bytes": 7},
        {"text": "ab>ba\ncd>dc", "prompt_bytes": 6, "scored": [[9, 11], [11, 11]]},
        {"text": "ab", "prompt_bytes": 1, "scored": None},
    ]
    path.write_text("\ufeff" + "\r\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8")
    assert read_documents(path, 20) == [
        Document("naïve: é", 7),
        Document("ab>ba\ncd>dc", 6, ((9, 11), (11, 11))),
        Document("ab", 1),
    ]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{", "expected JSON in line 2 of .*own.jsonl, got: "),
        (b"[" * 100_000, "expected JSON in line 2 of .*, got: "),
        (b"[]", 'expected an object with a text "text" and a number "prompt_bytes" in line 2'),
        (b'{"text": 1, "prompt_bytes": 1}', 'expected an object with a text "text" and a number "prompt_bytes"'),
        (b'{"text": "abc"}', 'expected an object with a text "text" and a number "prompt_bytes"'),
        (b'{"text": "abc", "prompt_bytes": true}', 'a number "prompt_bytes" in line 2'),
        (b'{"text": "abc", "prompt_bytes": 1.0}', 'a number "prompt_bytes" in line 2'),
        (b'{"text": "abc", "prompt_bytes": 1, "score": []}', "expected the keys prompt_bytes, .* got 'score'"),
        (b'{"text": "\\ud800", "prompt_bytes": 1}', 'expected a "text" of whole characters in line 2'),
        (b'{"text": "abcdefghijkl", "prompt_bytes": 1}', "expected at most 10 bytes of text in line 2 .*, got 12"),
        (b'{"text": "abc", "prompt_bytes": 0}', "expected prompt_bytes of at least 1 in line 2 .*, got 0"),
        (
            b'{"text": "abc", "prompt_bytes": 4}',
            "line 2 of .*: expected prompt_bytes to be .* from 0 to 3, got 4",
        ),
        ('{"text": "éa", "prompt_bytes": 1}'.encode(), "expected a whole character within prompt_bytes in line 2"),
        (b'{"text": "abc", "prompt_bytes": 3}', "expected scored bytes after the prompt in line 2 .*, got none"),
        (b'{"text": "abc", "prompt_bytes": 1, "scored": []}', "expected scored bytes after the prompt in line 2"),
        (
            b'{"text": "abc", "prompt_bytes": 1, "scored": [[1]]}',
            r'expected "scored" as .* in line 2 .*, got \[\[1\]\]',
        ),
        (b'{"text": "abc", "prompt_bytes": 1, "scored": 3}', r'expected "scored" as .* in line 2 .*, got 3'),
        (
            b'{"text": "abc", "prompt_bytes": 1, "scored": [[1, 9]]}',
            "line 2 of .*: expected the end of a scored",
        ),
        (b'{"text": "\xff", "prompt_bytes": 1}', "expected UTF-8 in .*own.jsonl, got another byte at position"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, line: bytes, said: str) -> None:
    path = tmp_path / "own.jsonl"
    path.write_bytes(b'{"text": "abc", "prompt_bytes": 1}\n' + line)
    with pytest.raises(ConfigError, match=said) as caught:
        read_documents(path, 10)
    assert len(str(caught.value)) < 300 + len(str(path))


def test_files_without_documents(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected a readable file .*, got: No such file"):
        read_documents(tmp_path / "nowhere", 10)
    with pytest.raises(ConfigError, match=r"expected a readable file .*, got: Is a directory"):
        read_documents(tmp_path, 10)
    (tmp_path / "empty").write_text("\n \n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"expected a document in each line of .*, got no line with text"):
        read_documents(tmp_path / "empty", 10)

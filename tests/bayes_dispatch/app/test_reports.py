"""A report takes the place of an earlier one of its kind, and of nothing else."""

from pathlib import Path

import pytest

from bayes_dispatch.app.reports import write_report
from bayes_dispatch.errors import BundleError


def test_reports_replace_reports_alone(tmp_path: Path) -> None:
    def write(text: str, title: str = "# Ours", picture: bool = True) -> None:
        with write_report(tmp_path / "out", ["a.png", "report.md"], title) as new:
            if picture:
                (new / "a.png").write_text(text)
            (new / "report.md").write_text(f"{title}\n{text}")

    def contents() -> dict[str, str]:
        return {file.name: file.read_text() for file in (tmp_path / "out").iterdir()}

    write("old")
    (tmp_path / "out" / "note").write_text("mine")
    write("new")
    after = {"a.png": "new", "report.md": "# Ours\nnew", "note": "mine"}
    assert contents() == after
    with pytest.raises(BundleError, match=r"^expected no a\.png in .*out, or that of an earlier run, got another$"):
        write("other", "# Another")
    assert contents() == after
    write("less", picture=False)
    assert contents() == {"report.md": "# Ours\nless", "note": "mine"}
    (tmp_path / "out" / "report.md").rename(tmp_path / "out" / "a.png")
    with pytest.raises(BundleError, match=r"^expected no a\.png in"):
        write("again")

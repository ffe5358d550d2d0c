"""When and with what an expert was made."""

import os
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

import torch

__all__ = ["provenance"]


def provenance() -> dict[str, str]:
    """``date`` (UTC), and the versions of ``bayes_dispatch`` and ``torch``, for an expert's metadata.

    The date is that of ``SOURCE_DATE_EPOCH`` where it is set, so that two runs can give the same bytes.
    """
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    now = datetime.fromtimestamp(int(epoch), UTC) if epoch.isdecimal() else datetime.now(UTC)
    try:
        ours = version("bayes-dispatch")
    except PackageNotFoundError:
        ours = "not installed"
    return {"date": now.date().isoformat(), "bayes_dispatch": ours, "torch": torch.__version__}

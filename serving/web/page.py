"""The page at ``/`` for people: one document, of the three files in ``html/``, which loads nothing else.

Its policy lets run its own script and style alone, by their hashes, send requests to this server alone, and make no
markup from text: what a model writes stays text.
"""

import base64
import hashlib
from functools import cache
from importlib.resources import files

from starlette.responses import HTMLResponse

__all__ = ["page_answer"]

POLICY = (
    "default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)


def page_answer() -> HTMLResponse:
    """The page with its policy."""
    document, policy = _page()
    headers = {
        "content-security-policy": policy,
        "cache-control": "no-cache",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }
    return HTMLResponse(document, headers=headers)


@cache
def _page() -> tuple[str, str]:
    """The document and its policy."""
    folder = files("bayes_dispatch.serving.web") / "html"
    document, style, script = ((folder / f"page.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js"))
    hashes = {"style": _hash(style), "script": _hash(script)}
    return document.replace("{style}", style).replace("{script}", script), POLICY.format(**hashes)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

"""Docstrings as the API page shows them: Sphinx roles become links, examples become code."""

from __future__ import annotations

import re
from typing import Any

import griffe

#: Such as ``:func:`mec_embed.save```; names of the package may leave out ``mec_embed.``.
_ROLE = re.compile(r":(?:class|func|meth|attr|data|mod):`~?([\w.]+)`")
#: Functions that hide the module of their name.
_HIDING = ("mec_embed.compress", "mec_embed.distill")


class Docstrings(griffe.Extension):
    """Rewrites every docstring once it is read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the text of the docstring, if there is one."""
        if obj.docstring is not None:
            text = _ROLE.sub(lambda role: _link(role[1]), obj.docstring.value)
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)


def _link(name: str) -> str:
    """A link to what the page has of that name; without a link what it has not."""
    short = name.removeprefix("mec_embed.")
    target = f"mec_embed.{short}"
    if target in _HIDING:
        target += f".{short}"
    return f'<autoref optional identifier="{target}"><code>{short}</code></autoref>'

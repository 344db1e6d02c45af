"""Frameworks of which mec_embed knows what they hold beside their modules.

Importing this registers an adapter for each, so that :func:`mec_embed.compress` recognises their
models. No framework is imported before one of its models is at hand.
"""

from . import deepctr, fuxictr, rechub, torchrec

__all__ = ["deepctr", "fuxictr", "rechub", "torchrec"]

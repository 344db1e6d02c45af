"""The C kernel of the lookups; everything else is declared in pyproject.toml."""

import sys

from setuptools import Extension, setup

# No contraction to fused multiply-adds: results equal those of plain torch bit for bit.
FLAGS = [] if sys.platform == "win32" else ["-O3", "-ffp-contract=off"]

setup(
    ext_modules=[
        Extension(
            "mec_embed.ops._native",
            ["mec_embed/ops/_native.c"],
            extra_compile_args=FLAGS,
            libraries=[] if sys.platform == "win32" else ["pthread"],
            py_limited_api=True,
            # Without a compiler the install succeeds, and plain torch serves.
            optional=True,
        )
    ],
    # One wheel for every Python from 3.10 on.
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)

"""The C kernel; everything else is declared in pyproject.toml."""

import sys
from glob import glob

from setuptools import Extension, setup

# No contraction to fused multiply-adds: results equal those of plain torch bit for bit.
# Vectors are never passed between functions, so that their calling convention does not matter.
FLAGS = ["-O3", "-ffp-contract=off", "-fvisibility=hidden", "-Wno-psabi", "-g0"]
if sys.platform == "win32":
    FLAGS = []

setup(
    ext_modules=[
        Extension(
            "mec_embed._native",
            sorted(glob("mec_embed/native/*.c")),
            depends=glob("mec_embed/native/*.h"),
            extra_compile_args=FLAGS,
            libraries=[] if sys.platform == "win32" else ["pthread", "m"],
            py_limited_api=True,
            # Without a compiler the install succeeds, and plain torch serves.
            optional=True,
        )
    ],
    # One wheel for every Python from 3.10 on.
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)

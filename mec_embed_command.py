"""What ``mec-embed`` starts.

It is outside the package because that imports torch, which takes seconds: here, Ctrl-C meanwhile is
met as :func:`mec_embed.cli.main` meets it later.
"""

import sys


def main() -> int:
    """Run the command line; returns the exit code."""
    try:
        from mec_embed.cli import main as run
    except KeyboardInterrupt:
        sys.stderr.write("mec-embed: error: interrupted\n")
        return 130
    return run()

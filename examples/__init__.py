"""Demo and benchmark scripts, run from the repository root as ``python -m examples.<script>``."""

"""Ideas that were measured; docs/experiments.md says what came of them."""

"""The self-describing frame: docs/format.md."""

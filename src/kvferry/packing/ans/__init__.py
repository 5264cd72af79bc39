"""The `ans` packer: docs/format.md."""

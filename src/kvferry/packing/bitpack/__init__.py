"""The `bitpack` packer: docs/format.md."""

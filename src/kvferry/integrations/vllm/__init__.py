"""vLLM's KV offloading, compressed (docs/vllm.md). Importing this needs no vLLM; `connector` and `spec` do."""

from kvferry.integrations.vllm.select import transfer_config, without_compression
from kvferry.integrations.vllm.settings import OffloadSettings

__all__ = ["OffloadSettings", "transfer_config", "without_compression"]

"""For workers on the CPU that vLLM starts in processes of their own: importing this, as their `worker_extension_cls`,
brings the operators, and has them keep their slots where workers on GPUs do, side by side in rows of shared memory."""

import cpu_operators  # noqa: F401

from kvferry.integrations.vllm.spec import KVFerrySpec


class SharedRows:
    """Adds nothing to a worker."""


KVFerrySpec._uses_shared_region = lambda self: True  # vLLM has it for GPUs only

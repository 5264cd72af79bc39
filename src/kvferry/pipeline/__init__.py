"""Transfers between paged KV cache on a device and slots in host memory, compressed on the way: `Transfers`."""

from kvferry.pipeline.job import Job, JobResult
from kvferry.pipeline.settings import Settings
from kvferry.pipeline.transfers import Transfers

__all__ = ["Job", "JobResult", "Settings", "Transfers"]

"""Training on several ranks by torch.distributed: gloo on CPUs, NCCL on GPUs."""

from .data_parallel import DataParallel
from .launch import Launch, process_group

__all__ = ["DataParallel", "Launch", "process_group"]

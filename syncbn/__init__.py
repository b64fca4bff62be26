"""Synchronized batch normalization for PyTorch: one all-reduce forward, one backward, exact on every device."""

from syncbn.convert import convert_sync_batchnorm as convert_sync_batchnorm
from syncbn.convert import revert_sync_batchnorm as revert_sync_batchnorm
from syncbn.functional import sync_batch_norm as sync_batch_norm
from syncbn.groups import new_sync_groups as new_sync_groups
from syncbn.module import BatchNorm as BatchNorm
from syncbn.module import SyncBatchNorm as SyncBatchNorm

__all__ = [
    "BatchNorm",
    "SyncBatchNorm",
    "convert_sync_batchnorm",
    "new_sync_groups",
    "revert_sync_batchnorm",
    "sync_batch_norm",
]

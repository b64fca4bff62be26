"""Synchronized batch normalization for PyTorch: one all-reduce forward, one backward, exact on every device."""

from syncbn.checks import assert_replicas_equal as assert_replicas_equal
from syncbn.checks import detect_desync as detect_desync
from syncbn.convert import convert_sync_batchnorm as convert_sync_batchnorm
from syncbn.convert import revert_sync_batchnorm as revert_sync_batchnorm
from syncbn.errors import DesyncError as DesyncError
from syncbn.errors import PeerError as PeerError
from syncbn.errors import TooFewValuesError as TooFewValuesError
from syncbn.functional import sync_batch_norm as sync_batch_norm
from syncbn.fuse import fuse as fuse
from syncbn.fuse import fusion_report as fusion_report
from syncbn.groups import new_sync_groups as new_sync_groups
from syncbn.module import BatchNorm as BatchNorm
from syncbn.module import LazySyncBatchNorm as LazySyncBatchNorm
from syncbn.module import SyncBatchNorm as SyncBatchNorm
from syncbn.norm_act_conv import Convolution as Convolution
from syncbn.norm_act_conv import NormActConv as NormActConv
from syncbn.norm_act_conv import call_fused as call_fused
from syncbn.norm_act_conv import sync_norm_act_conv as sync_norm_act_conv
from syncbn.recalibrate import merge_running_stats as merge_running_stats
from syncbn.recalibrate import recalibrate as recalibrate

__version__ = "0.1.0"

__all__ = [
    "BatchNorm",
    "Convolution",
    "DesyncError",
    "LazySyncBatchNorm",
    "NormActConv",
    "PeerError",
    "SyncBatchNorm",
    "TooFewValuesError",
    "assert_replicas_equal",
    "call_fused",
    "convert_sync_batchnorm",
    "detect_desync",
    "fuse",
    "fusion_report",
    "merge_running_stats",
    "new_sync_groups",
    "recalibrate",
    "revert_sync_batchnorm",
    "sync_batch_norm",
    "sync_norm_act_conv",
]

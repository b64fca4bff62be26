"""SyncBatchNormPlugin: SyncBatchNorm in a Lightning trainer. Imports lightning; no other module of syncbn imports this.

    import lightning
    from syncbn.lightning import SyncBatchNormPlugin

    trainer = lightning.Trainer(devices=4, strategy="ddp", plugins=[SyncBatchNormPlugin()])
    trainer.fit(model)  # layers are plain BatchNorm again afterwards

Do not set `Trainer(sync_batchnorm=True)` as well: that is torch's layer.
"""

from typing import Literal

from lightning.pytorch.plugins import LayerSync
from torch import nn

from syncbn.convert import convert_sync_batchnorm, revert_sync_batchnorm
from syncbn.groups import new_sync_groups


class SyncBatchNormPlugin(LayerSync):
    """Synchronizes BatchNorm over several ranks during fit; before and after, the layers are plain BatchNorm.

    Args:
        group: all ranks ("world"), the ranks of a node ("node"), or a number of consecutive ranks.
    """

    def __init__(self, group: int | Literal["world", "node"] = "world") -> None:
        self.group = group

    def apply(self, model: nn.Module) -> nn.Module:
        """Return the model with synchronized BatchNorm; Lightning calls this once the process group is initialized."""
        group = None if self.group == "world" else new_sync_groups(self.group)
        return convert_sync_batchnorm(model, group)

    def revert(self, model: nn.Module) -> nn.Module:
        """Return the model with its original BatchNorm classes."""
        return revert_sync_batchnorm(model)

"""What a run prints: lines that are also logged, and no warnings about deliberate choices."""

import logging
import warnings

log = logging.getLogger(__name__)

DELIBERATE = (
    # the metrics need no `sync_dist`: they are already summed over all ranks, and its means are wrong for uneven ranks
    *(".*sync_dist=True.*", ".*does not have many workers.*", ".*LeafSpec.*", ".*logging interval.*"),
    *(".*dataloader is not resumable.*", ".*exists and is not empty.*"),  # `Snapshots` handles both
    ".*overridden `on_before_batch_transfer`.*",  # `ImageClassifier` checks every batch there
    *(".*weights.only.*", ".*checkpoint was not created with WeightAveraging.*"),
)


def quiet() -> None:
    """Silence warnings about deliberate choices, and what Lightning says about itself."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in DELIBERATE:
        warnings.filterwarnings("ignore", message)


def say(line: str) -> None:
    """Print a line and log it."""
    print(line, flush=True)
    log.info(line)

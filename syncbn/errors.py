"""The errors of this package that a caller may want to recognize by class."""


class DesyncError(RuntimeError):
    """Ranks of a group make different calls of synchronized layers; the message has a table of each rank's call."""


class PeerError(ValueError):
    """Another rank of the group has raised before an all-reduce that this rank takes part in; see its error."""


class TooFewValuesError(ValueError):
    """A batch to train on has one value per channel over all ranks, of which no variance can be computed."""

"""`python -m train key=value ...`, or `torchrun --nproc-per-node=K -m train key=value ...` for K ranks."""

import contextlib
import io
import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from train import distenv


@hydra.main(config_path="pkg://conf", config_name="train", version_base="1.3")
def task(config: DictConfig) -> float:
    """Train once and return the test accuracy, the objective of a Hydra sweep."""
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    from train import run

    if HydraConfig.get().mode == RunMode.MULTIRUN:
        config.run_dir = HydraConfig.get().runtime.output_dir  # one directory per job of the sweep
    try:
        metrics = run.fit(config)
    except Exception as error:
        refusal = run.refusal_in(error)
        if refusal is None:
            raise
        distenv.leave(refusal)
    return metrics.get("test_accuracy", float("nan"))


def main() -> None:
    """Run the task on every rank; only rank 0 writes Hydra's directory and log, and it reports Hydra's errors first."""
    distenv.register_resolvers()
    distenv.refuse_multirun(sys.argv[1:])
    distenv.refuse_slurm_tasks()
    if distenv.rank() == 0:
        task()
        return
    sys.argv += ["hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none"]
    held_back = io.StringIO()
    try:
        with contextlib.redirect_stderr(held_back), contextlib.redirect_stdout(io.StringIO()):
            task()
    except SystemExit as exit:
        if held_back.getvalue():
            distenv.leave(held_back.getvalue())
        raise exit


if __name__ == "__main__":
    main()

"""`python -m train key=value ...`, or `torchrun --nproc-per-node=K -m train key=value ...` for K ranks."""

import sys
import traceback

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import to_absolute_path
from omegaconf import DictConfig

from train import distenv, errors, hydra_app

failed_jobs: list[str] = []  # of the sweep in this process


@hydra.main(config_path="pkg://conf", config_name="train", version_base="1.3")
def task(config: DictConfig) -> float:
    """Train once and return the test accuracy, the objective of a Hydra sweep; NaN for a job that failed in one."""
    hydra_app.begin()
    from train import run

    is_sweep = HydraConfig.get().mode == RunMode.MULTIRUN
    if is_sweep:
        config.run_dir = HydraConfig.get().runtime.output_dir  # one directory per job of the sweep
    if HydraConfig.get().job.chdir:
        _anchor_paths(config)
    try:
        metrics = run.fit(config)
    except Exception as error:
        refusal = errors.refusal_in(error)
        if is_sweep:
            return _record_failure(refusal)
        if refusal is None:
            raise
        distenv.leave(refusal)
    return metrics.get("test_accuracy", float("nan"))


def _anchor_paths(config: DictConfig) -> None:
    """Make relative paths absolute before Hydra's change of directory would redirect them."""
    config.run_dir = to_absolute_path(config.run_dir)
    if config.resume not in (None, "auto"):
        config.resume = to_absolute_path(config.resume)
    if config.model.get("pretrained"):
        config.model.pretrained = to_absolute_path(config.model.pretrained)
    if config.data.get("root") is not None:
        config.data.root = to_absolute_path(config.data.root)


def _record_failure(refusal: str | None) -> float:
    """Report a job of a sweep that failed, in the handler of its error, and return its objective."""
    hydra_config = HydraConfig.get()
    failed_jobs.append(f"{hydra_config.job.num} ({' '.join(hydra_config.overrides.task)})")
    if refusal is None:
        traceback.print_exc()
    print(f"job {failed_jobs[-1]} failed: {refusal or 'see above'}; the sweep goes on", file=sys.stderr, flush=True)
    return float("nan")


def main() -> None:
    """Run the task on every rank."""
    distenv.register_resolvers()
    distenv.refuse_multirun(sys.argv[1:])
    distenv.refuse_slurm_tasks()
    hydra_app.start(task, "python -m train --cfg job")
    if failed_jobs:
        sys.exit(f"error: {len(failed_jobs)} job(s) of the sweep failed: {', '.join(failed_jobs)}")


if __name__ == "__main__":
    main()

"""Every recipe takes two steps on made-up images of its real size, with 2 images per rank."""

import pytest
from cli import REPOSITORY
from lightning.pytorch import Callback
from ranks import run_ranks
from slow import all_but
from test_train_on_ranks import as_torchrun

from train import run

RECIPES = sorted(path.stem for path in (REPOSITORY / "conf" / "experiment").glob("*.yaml"))
ON_TWO_RANKS = ["cifar10_preact18", "digits", "imagenet_preact50", "small_batch"]  # the others are deep: one will do


def recipe(name):
    """The recipe's configuration with other images of the same size, classes and augmentation."""
    given = ["model.pretrained=null"] if name == "finetune" else []
    own = run.compose([f"experiment={name}", "run_name=x", *given])
    images = own.data
    config = run.compose(
        [
            *(f"experiment={name}", "data=fake", "run_name=x", "data.batch_size_per_rank=2", "data.num_workers=0"),
            *(
                f"data.image_size={images.image_size}",
                f"data.num_classes={images.num_classes}",
                "data.eval_batch_size=4",
            ),
            *("data.source.num_train=8", "data.source.num_test=2", "data.val_fraction=0", "logger=none", "trainer=cpu"),
            *("callbacks=none", "test_checkpoint=last", "+trainer.max_steps=2", "+trainer.enable_checkpointing=false"),
            *("+trainer.enable_progress_bar=false", *given),
        ]
    )
    config.data.train_transforms = images.train_transforms
    config.data.batch_transforms = images.batch_transforms
    if images.image_size > 64 and "width" in own.model:
        assert own.model.width is None
        config.model.width = 16  # a quarter of the published one: four deep networks would take a minute
    config.compile = False  # minutes for the deep ones; one graph is tested in test_train_speed.py
    for key in ("precision", "accumulate_grad_batches", "gradient_clip_val"):
        assert config.trainer[key] == own.trainer[key]
    config.trainer.precision = "32-true"  # 20 times faster on a CPU; test_train_speed.py trains in bfloat16
    for key in ("optimizer", "scheduler", "norm", "mixing", "label_smoothing", "channels_last", "finetune"):
        assert config[key] == own[key]
    assert config.model.get("depth") == own.model.get("depth")
    return config


class Shapes(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append((tuple(batch[0].shape), bool(outputs["loss"].isfinite())))


def two_steps(names):
    as_torchrun()
    seen = []
    for name in names:
        trainer, model, data = run.build(recipe(name))
        shapes = Shapes()
        trainer.callbacks.append(shapes)
        trainer.fit(model, datamodule=data)
        seen.append((trainer.global_step, shapes.seen))
        trainer.strategy.barrier()
    return seen


ON_ONE_RANK = [(1, (name,)) for name in RECIPES if name not in ON_TWO_RANKS]
ON_RANKS = [(2, (name,)) for name in ON_TWO_RANKS]
QUICK = [*ON_RANKS[:2], (1, ("cifar10_preact18_one_cycle",)), (1, ("finetune",))]


@pytest.mark.parametrize("world_size, names", all_but(QUICK, [*ON_RANKS, *ON_ONE_RANK]), ids=str)
def test_every_recipe_takes_two_steps(world_size, names):
    sizes = [run.compose([f"experiment={name}", "run_name=x"]).data.image_size for name in names]
    for rank in run_ranks(world_size, two_steps, list(names), timeout_s=500, collective_timeout_s=120):
        for name, size, (steps, seen) in zip(names, sizes, rank, strict=True):
            assert steps == 2, name
            channels = seen[0][0][1]
            assert seen == [((2, channels, size, size), True)] * 2, name


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_says_how_to_run_it_what_to_expect_and_what_was_measured(name):
    text = (REPOSITORY / "conf" / "experiment" / f"{name}.yaml").read_text()
    header = " ".join(line.removeprefix("# ") for line in text.splitlines() if line.startswith("#"))
    for part in (f"experiment={name}", "Published: ", "Time: ", "Measured here: "):
        assert part in header

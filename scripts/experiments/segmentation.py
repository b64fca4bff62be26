"""Segmentation with one image per rank: what synchronization is worth where it matters.

In detection and segmentation a GPU holds one or two images, whose statistics are not those of the data set; batch
normalization then has to be frozen, replaced or synchronized (He et al. 2017, Mask R-CNN, freezes it; Wu & He 2018
replace it; Peng et al. 2018, MegDet, synchronize it).

The images are 64 pixels wide: digits of one or two classes, enlarged to 16 pixels, over gray crops of the two
photographs that scikit-learn ships, each image with a brightness and contrast of its own. Every pixel is to be assigned
to one of 10 digits or the background. As usual, a classifier is trained first, on single digits over such crops (4
ranks, 64 images per step, 10 epochs, local BN or GroupNorm), and its pre-activation ResNet (3 stages of one unit, width
16) becomes the backbone of torchvision's FCN head. Then 4 ranks train with one image each for 200 steps of Adam with a
one-cycle schedule, and are tested on 128 images with digits that were not seen before. The highest rate is the better
of 0.01 and 0.003 for each norm on a seed that is not among those shown; the loss of background pixels counts 0.2. With
"frozen" the backbone keeps the statistics, weights and biases of its norms, and the head has none. Mean IoU is the mean
over the 11 classes (torchmetrics).
"""

import copy
from functools import cache

import lab
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_sample_images
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import JaccardIndex
from torchvision.models.segmentation.fcn import FCNHead

import syncbn
from syncbn.lightning import SyncBatchNormPlugin
from train import datasets, distenv
from train.norms import group_norm
from train.plugins import strategy

RANKS = 4
# the better of 1e-2 and 3e-3 for seed 9
RATES = {"sync": 1e-2, "local": 3e-3, "frozen": 3e-3, "group": 3e-3}
CLASSES = 11
BACKGROUND_WEIGHT = 0.2  # its loss; most pixels are background
SIZE, DIGIT, PATCH = 64, 16, 24
LABELS = {
    "local": "local BN",
    "recalibrated": "local BN, recalibrated",
    "sync": "SyncBN",
    "group": "GroupNorm",
    "frozen": "frozen BN",
}


# --- images: real digits over real photographs ---------------------------------------------------------------------


def _crop(photographs, size, generator):
    """Return a gray crop (size, size) of a photograph with a brightness and a contrast of its own."""
    photograph = photographs[torch.randint(len(photographs), (), generator=generator)]
    top, left = (int(torch.randint(extent - size, (), generator=generator)) for extent in photograph.shape)
    brightness, contrast = torch.rand(2, generator=generator)
    return brightness + 0.4 * contrast * (photograph[top : top + size, left : left + size] - 0.5)


def _paste(image, digit, top, left, generator):
    """Draw a digit (8, 8) into an image, brighter than what was there, and return its pixels."""
    shape = F.interpolate(digit[None, None], size=(DIGIT, DIGIT), mode="bilinear")[0, 0]
    part = image[top : top + DIGIT, left : left + DIGIT]
    part += (0.3 + 0.4 * torch.rand((), generator=generator)) * shape
    return shape > 0.4


def _photographs():
    return [torch.from_numpy(image / 255).float().mean(2) for image in load_sample_images().images]


def patches(root=None, download=False):
    """Return single digits over crops: a data source of the trainer, (1, 24, 24) and their classes."""
    photographs, splits = _photographs(), datasets.digits()

    def over_crops(dataset, seed):
        generator = torch.Generator().manual_seed(seed)
        digits, labels = dataset.tensors
        images = torch.empty(len(digits), 1, PATCH, PATCH)
        for image, digit in zip(images, digits, strict=True):
            image[0] = _crop(photographs, PATCH, generator)
            top, left = torch.randint(PATCH - DIGIT, (2,), generator=generator).tolist()
            _paste(image[0], digit[0], top, left, generator)
        return TensorDataset(images, labels)

    return splits._replace(train=over_crops(splits.train, 0), test=over_crops(splits.test, 1))


def scenes(dataset, count, seed):
    """Return `count` images (1, 64, 64), normalized like the patches, and the class of every pixel (64, 64)."""
    generator = torch.Generator().manual_seed(seed)
    photographs, (digits, labels) = _photographs(), dataset.tensors
    images = torch.empty(count, 1, SIZE, SIZE)
    masks = torch.zeros(count, SIZE, SIZE, dtype=torch.long)
    for image, mask in zip(images, masks, strict=True):
        image[0] = _crop(photographs, SIZE, generator)
        shown = torch.randperm(CLASSES - 1, generator=generator)[: 1 + torch.randint(2, (), generator=generator)]
        candidates = torch.isin(labels, shown).nonzero().flatten()
        for place in torch.randperm(16, generator=generator)[:6].tolist():  # of 4 x 4 cells
            index = candidates[torch.randint(len(candidates), (), generator=generator)]
            top, left = (place // 4 * DIGIT, place % 4 * DIGIT)
            pixels = _paste(image[0], digits[index, 0], top, left, generator)
            mask[top : top + DIGIT, left : left + DIGIT][pixels] = labels[index] + 1
    return TensorDataset((images - 0.5) / 0.25, masks)


# --- training -----------------------------------------------------------------------------------------------------


class Segmenter(LightningModule):
    """A backbone and torchvision's FCN head; trains with the mean cross-entropy over all pixels."""

    def __init__(self, classifier, norm):
        super().__init__()
        self.rate = RATES[norm]
        self.stem, self.stages, self.norm = classifier.stem, classifier.stages, classifier.norm
        self.head = FCNHead(classifier.head.in_features, CLASSES)
        if norm == "frozen":
            self.head[1] = nn.Identity()
        if norm == "group":
            self.head[1] = group_norm(self.head[1].num_features, 8)
        norms = [module for module in self.modules() if isinstance(module, nn.BatchNorm2d)]
        self.frozen = norms if norm == "frozen" else []
        for module in self.frozen:
            module.requires_grad_(False)
        self.register_buffer("class_weights", torch.tensor([BACKGROUND_WEIGHT] + [1.0] * (CLASSES - 1)))
        self.iou = JaccardIndex(task="multiclass", num_classes=CLASSES)

    def forward(self, images):
        """Return the logits of every pixel."""
        features = F.relu(self.norm(self.stages(self.stem(images))))
        return F.interpolate(self.head(features), images.shape[-2:], mode="bilinear")

    def on_train_epoch_start(self):
        """Keep the statistics of frozen norms."""
        for module in self.frozen:
            module.eval()

    def training_step(self, batch, batch_idx):
        """Return the loss of this rank's image."""
        return F.cross_entropy(self(batch[0]), batch[1], self.class_weights)

    def on_train_end(self):
        """Give all ranks the same statistics."""
        syncbn.merge_running_stats(self)

    def test_step(self, batch, batch_idx):
        """Count the pixels of this rank's images."""
        self.iou.update(self(batch[0]).argmax(1), batch[1])

    def on_test_epoch_end(self):
        """Log the mean IoU over all ranks' images."""
        self.log("mean_iou", self.iou)

    def configure_optimizers(self):
        """Return Adam with a cosine schedule."""
        steps = self.trainer.max_steps
        optimizer = torch.optim.Adam([p for p in self.parameters() if p.requires_grad])
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.rate, total_steps=steps, pct_start=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def pretrained(norm, seed, epochs):
    """Return a classifier of single digits, and its accuracy."""
    trained = lab.train(
        [
            *lab.SMALL_RESNET,
            "model.width=16",
            f"norm={norm}",
            f"seed={seed}",
            "data.source._target_=segmentation.patches",
            f"data.image_size={PATCH}",
            "data.mean=[0.5]",
            "data.std=[0.25]",
            "data.train_transforms=[]",
            f"trainer.max_epochs={epochs}",
            "+trainer.limit_val_batches=0",
        ]
    )
    return trained.model.network, trained.test["test_accuracy"]


@cache
def _data(train, test):
    splits = datasets.digits()
    return scenes(splits.train, train, 0), scenes(splits.test, test, 1)


@cache
def _backbone(norm, seed, epochs):
    return pretrained(norm, seed, epochs)


def jobs(seeds, quick):
    """Return a job for each norm and seed."""
    size = {"epochs": 1, "steps": 2, "images": (8, 4)} if quick else {"epochs": 10, "steps": 200, "images": (512, 128)}
    return [{"norm": norm, "seed": seed, **size} for seed in seeds for norm in ("sync", "local", "frozen", "group")]


def run(job):
    """Return the row of a run, and for local BN that of its recalibrated network."""
    norm, seed, steps = job["norm"], job["seed"], job["steps"]
    classifier, accuracy = _backbone("group" if norm == "group" else "local", seed, job["epochs"])
    seed_everything(seed, verbose=False)
    module = Segmenter(copy.deepcopy(classifier), norm)
    train_set, test_set = _data(*job["images"])
    world_size = distenv.world_size()
    trainer = Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=strategy("cpu"),
        plugins=[SyncBatchNormPlugin()] if norm == "sync" else [],
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(train_set, 1, shuffle=True))
    tests = DataLoader(test_set, 4)
    row = {"norm": norm, "seed": seed, "steps": steps, "pretrained_accuracy": accuracy}
    rows = [{**row, "mean_iou": 100 * trainer.test(module, tests, verbose=False)[0]["mean_iou"]}]
    if norm == "local":
        own = [image[None] for image, _ in train_set][distenv.rank() :: world_size]
        syncbn.recalibrate(module, own[:64])
        found = trainer.test(module, tests, verbose=False)[0]["mean_iou"]
        rows.append({**row, "norm": "recalibrated", "mean_iou": 100 * found})
    return rows


def draw(rows):
    """Draw an image with its classes, and the mean IoU of each norm."""
    figure, (image, classes, axes) = lab.panels(3)
    shown = scenes(datasets.digits().test, 7, 1)
    for part, values, title, colours in (
        (image, shown.tensors[0][6, 0], "an image", "gray"),
        (classes, shown.tensors[1][6], "its classes", "tab20"),
    ):
        part.imshow(values, cmap=colours)
        part.set(title=title, xticks=[], yticks=[])
        part.grid(visible=False)
    for place, norm in enumerate(LABELS):
        found = lab.column(rows, "mean_iou", norm=norm)
        axes.bar(place, found.mean, yerr=found.half, color=lab.COLOURS[place], capsize=4)
        values = [row["mean_iou"] for row in lab.where(rows, norm=norm)]
        axes.scatter([place] * len(values), values, s=10, color="black", zorder=3)
    axes.set_xticks(range(len(LABELS)), [label.replace(", ", ",\n") for label in LABELS.values()])
    axes.tick_params(axis="x", labelsize=7)
    axes.set(ylabel="mean IoU (%)", title="1 image per rank, 4 ranks")
    return figure


def sentence(rows):
    """Return what was seen."""
    iou = {norm: lab.column(rows, "mean_iou", norm=norm) for norm in LABELS}
    gains = {
        norm: lab.difference(rows, "mean_iou", {"norm": "sync"}, {"norm": norm}) for norm in LABELS if norm != "sync"
    }
    better = [norm for norm, gain in gains.items() if gain.mean > 0 and gain.excludes_zero]
    verdict = "holds" if len(better) == len(gains) else "holds in part" if "local" in better else "does not hold here"
    others = "; ".join(
        f"{LABELS[norm]} {iou[norm].text(1, '%')} (SyncBN has {gain.mean:+.1f} ± {gain.half:.1f} points)"
        for norm, gain in gains.items()
    )
    return (
        f"The claim that synchronizing is better than each alternative {verdict}: with one image per rank on {RANKS} "
        f"ranks the mean IoU is {iou['sync'].text(1, '%')} with SyncBN; {others}."
    )


if __name__ == "__main__":
    lab.main(ranks=RANKS)

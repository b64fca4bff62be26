"""Temperature: a factor on the normalized output.

`temperature * bn(x)`: a smaller temperature is said to make the output of the network sharper, a larger one smoother.
(The PyTorch how-to among the sources. A softmax divides by its temperature; a factor that multiplies acts in the
opposite direction.)

A plain convnet (three 3x3 convolutions, 16 to 64 channels) trains on 5,000 images of CIFAR-10 with SGD (momentum 0.9,
learning rate 0.02) for 10 epochs in batches of 50, once with each temperature in all of its norms. "Changed for the
test" is the network that was trained with temperature 1, whose last norm gets another temperature for the test. Over
5,000 test images: the mean entropy of the predicted probabilities, the expected calibration error (torchmetrics, 15
bins) and the accuracy.
"""

import lab
import torch
from torchmetrics.functional.classification import multiclass_calibration_error

import syncbn

TEMPERATURES = (0.25, 0.5, 1.0, 2.0, 4.0)
IMAGES, TEST_IMAGES, BATCH = 5000, 5000, 50
MODES = {"training": "trained with it", "test": "changed for the test"}
PANELS = {"entropy": "mean entropy (nats)", "ece": "expected calibration error (%)", "test_accuracy": "accuracy (%)"}


def jobs(seeds, quick):
    """Return a job for each temperature and seed."""
    temperatures, steps = ((1.0, 2.0), 3) if quick else (TEMPERATURES, 10 * IMAGES // BATCH)
    return [
        {"temperature": temperature, "seed": seed, "steps": steps} for temperature in temperatures for seed in seeds
    ]


def figures(trained):
    """Return entropy, calibration error and accuracy over the test images."""
    scores, labels = lab.logits(trained, "test")
    probabilities = scores.softmax(1)
    error = multiclass_calibration_error(probabilities, labels, num_classes=10, n_bins=15)
    return {
        "entropy": torch.distributions.Categorical(probabilities).entropy().mean().item(),
        "ece": 100 * error.item(),
        "test_accuracy": 100 * (scores.argmax(1) == labels).double().mean().item(),
    }


def run(job):
    """Return the row of a run, and for temperature 1 those of its network with other temperatures."""
    trained = lab.train(
        [
            *lab.CONVNET,
            "norm=local",
            f"norm.temperature={job['temperature']}",
            "norm.activation=relu",  # so that the layer is syncbn.BatchNorm for temperature 1 too
            *lab.SGD,
            *lab.rate(0.02, BATCH),
            *lab.small_cifar10(IMAGES, TEST_IMAGES),
            *lab.TRAINS_ONLY,
            f"seed={job['seed']}",
            f"+trainer.max_steps={job['steps']}",
        ],
        test=False,
    )
    rows = [{**job, "mode": "training", **figures(trained)}]
    if job["temperature"] == 1:
        *_, last = (module for module in trained.model.network.modules() if isinstance(module, syncbn.BatchNorm))
        for temperature in TEMPERATURES:
            last.temperature = temperature
            rows.append({**job, "temperature": temperature, "mode": "test", **figures(trained)})
    return rows


def draw(rows):
    """Draw the three figures over the temperature."""
    figure, axes = lab.panels(3)
    for one, (name, label) in zip(axes, PANELS.items(), strict=True):
        for (mode, text), colour in zip(MODES.items(), lab.COLOURS, strict=False):
            lab.line(one, lab.where(rows, mode=mode), "temperature", name, text, colour)
        lab.plain_log(one, "x", TEMPERATURES)
        one.set(xlabel="temperature", ylabel=label)
    axes[0].legend(fontsize=7)
    return figure


def sentence(rows):
    """Return what was seen."""
    low, high = (extreme(lab.levels(rows, "temperature")) for extreme in (min, max))
    parts, signs = [], []
    for mode, text in MODES.items():
        change = lab.difference(
            rows, "entropy", {"mode": mode, "temperature": low}, {"mode": mode, "temperature": high}
        )
        signs.append(-change.mean if change.excludes_zero else 0.0)
        values = "; ".join(
            f"{temperature:g}: entropy {found['entropy'].text(2, 'nats')}, calibration error "
            f"{found['ece'].text(1, '%')}, accuracy {found['test_accuracy'].text(1, '%')}"
            for temperature in (low, 1.0, high)
            for found in [{name: lab.column(rows, name, mode=mode, temperature=temperature) for name in PANELS}]
        )
        parts.append(f"{text}, {values}")
    if all(sign > 0 for sign in signs):
        verdict = "The claim holds"
    elif all(sign < 0 for sign in signs):
        verdict = "The claim does not hold, the opposite does: a larger temperature is sharper"
    else:
        verdict = "The claim does not hold for both uses"
    trained, changed = parts
    return f"{verdict}. By temperature, {trained}. {changed[0].upper()}{changed[1:]}."


if __name__ == "__main__":
    lab.main()

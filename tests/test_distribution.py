"""What `pip install syncbn` brings: the wheel holds the layer alone, the sdist everything, its tests included."""

import re
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TRAINING = """
import sys

sys.path[:0] = [{site!r}]
import torch
import syncbn
assert syncbn.__file__.startswith({site!r}), syncbn.__file__
model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
syncbn.convert_sync_batchnorm(model)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
losses = []
x = torch.randn(4, 3, 8, 8)
for _ in range(5):
    loss = model(x).mean().square()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[-1] < losses[0]
print("trained", syncbn.__version__)
"""


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> Path:
    """Build both from a copy of the files that git tracks, or of all files where there is no repository."""
    folder = tmp_path_factory.mktemp("distributions")
    source = folder / "source"
    listed = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "-co", "--exclude-standard"], capture_output=True, text=True
    )
    names = listed.stdout.split() or [str(p.relative_to(ROOT)) for p in ROOT.rglob("*") if p.is_file()]
    for name in names:
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def test_the_wheel_holds_the_layer_alone_and_needs_torch_and_numpy(distributions):
    (wheel,) = distributions.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        (metadata,) = [file.read(name).decode() for name in names if name.endswith("/METADATA")]
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "syncbn").rglob("*.py")}
    assert {name for name in names if ".dist-info/" not in name} == modules | {"syncbn/py.typed"}
    required = [line.split(": ")[1] for line in metadata.splitlines() if line.startswith("Requires-Dist")]
    assert [line for line in required if "extra ==" not in line] == ["torch>=2.11", "numpy>=1.26"]


def link_distribution(name: str, site: Path, linked: set[str]) -> None:
    """Link an installed distribution, and those that it requires, into a directory."""
    if name in linked:
        return
    linked.add(name)
    try:
        found = distribution(name)
    except PackageNotFoundError:  # for another platform
        return
    for top in {file.parts[0] for file in found.files or () if file.parts[0] not in ("..", "__pycache__")}:
        if not (site / top).exists():
            (site / top).symlink_to(found.locate_file(top))
    for requirement in found.requires or ():
        if "extra ==" not in requirement:
            link_distribution(re.match(r"[\w.-]+", requirement).group(), site, linked)


def test_the_installed_wheel_trains_beside_torch_and_numpy_alone(distributions, tmp_path):
    (wheel,) = distributions.glob("*.whl")
    site, linked = tmp_path / "site", set()
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, wheel]
    subprocess.run(install, check=True, capture_output=True)
    for name in ("torch", "numpy"):
        link_distribution(name, site, linked)
    assert not {"lightning", "hydra-core", "torchvision", "matplotlib"} & linked
    code = TRAINING.format(site=str(site))
    run = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert run.stdout.startswith("trained "), run.stderr


@pytest.mark.slow
def test_the_tests_of_the_sdist_pass(distributions, tmp_path):
    (sdist,) = distributions.glob("*.tar.gz")
    with tarfile.open(sdist) as file:
        file.extractall(tmp_path, filter="data")
    (unpacked,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    source = distributions / "source"
    names = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    found = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    assert {name for name in names - found if ".egg-info" not in name} == set()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_statistics.py"]
    run = subprocess.run(
        [*command, "tests/test_conf.py", "-k", "statistics or belongs or choice_names or digits"],
        cwd=unpacked,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-2000:]

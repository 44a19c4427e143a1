"""Rebuilds everything in this folder: digits, the Fashion-MNIST subset, and the two feature networks.

    OMP_NUM_THREADS=1 python assets/make_assets.py [digits] [fashion_mnist] [digits-cnn] [fashion-cnn]

Needs scikit-learn (digits) and Debian's dataset-fashion-mnist. Data files come out byte for byte equal; the networks do
so on one machine with one thread, and differ by rounding elsewhere.
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fewstep.data.images import area_resize, read_idx, to_uint8
from fewstep.data.registry import make_source
from fewstep.nets.small_cnn import SmallCNN, weights_digest

HERE = Path(__file__).resolve().parent
FASHION = Path("/usr/share/datasets/fashion-mnist")
PER_CLASS, TEST = 1000, 2000
SEED = 0


def digits() -> None:
    """scikit-learn's load_digits as safetensors: images [1797, 8, 8] (0..16) and labels [1797], uint8."""
    from sklearn.datasets import load_digits

    data = load_digits()
    arrays = {
        "images": torch.from_numpy(data.images.astype(np.uint8)),
        "labels": torch.from_numpy(data.target.astype(np.uint8)),
    }
    _write_tensors(arrays, "digits/digits", {"source": "sklearn.datasets.load_digits", "licence": "BSD-3-Clause"})


def fashion_mnist() -> None:
    """The first 1,000 training images of each class, in their order, and the first 2,000 test images."""
    labels = read_idx(FASHION / "train-labels-idx1-ubyte.gz")
    chosen = np.sort(np.concatenate([np.flatnonzero(labels == c)[:PER_CLASS] for c in range(10)]))
    for split, rows in (("train", chosen), ("t10k", slice(TEST))):
        for kind in ("images-idx3", "labels-idx1"):
            name = f"{split}-{kind}-ubyte.gz"
            _write_idx(read_idx(FASHION / name)[rows], HERE / "fashion_mnist" / name)


def _write_idx(array: np.ndarray, file: Path) -> None:
    header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(gzip.compress(header + array.tobytes(), 9, mtime=0))


def _write_tensors(tensors: dict[str, Tensor], name: str, metadata: dict[str, str]) -> None:
    file = HERE / f"{name}.safetensors"
    file.parent.mkdir(exist_ok=True)
    # one entry, because safetensors writes several in an order that changes from run to run
    save_file(tensors, file, metadata={"about": json.dumps(metadata)})
    file.chmod(0o644)  # safetensors writes 0600


def digits_cnn() -> None:
    """Trained on the first 1,297 digits; accuracy on the other 500."""
    source = make_source({"source": "digits"})
    images, labels = _all(source)
    train, test = (images[:1297], labels[:1297]), (images[1297:], labels[1297:])
    model = _fit([train[0]], train[1], epochs=40, batch=64)
    said = {"data": "digits 0..1296", "accuracy": f"{_accuracy(model, *test):.4f} on digits 1297..1796", "epochs": "40"}
    _save(model, train[0], said, "digits-cnn")


def fashion_cnn() -> None:
    """Trained on the shipped 10,000 training images at 28x28 and 16x16; accuracy on the shipped 2,000 test images."""
    images, labels = _all(make_source({"source": "fashion_mnist"}))
    test, test_labels = _all(make_source({"source": "fashion_mnist", "split": "test"}))
    model = _fit([images, area_resize(images, 16)], labels, epochs=4, batch=64)
    at = {28: test, 16: area_resize(test, 16)}
    accuracy = ", ".join(f"{_accuracy(model, x, test_labels):.4f} at {side}x{side}" for side, x in at.items())
    said = {"data": "fashion_mnist subset, train", "accuracy": f"{accuracy}, test split", "epochs": "4 at each size"}
    _save(model, images, said, "fashion-cnn")


def _all(source: object) -> tuple[Tensor, Tensor]:
    rows = source.fetch(torch.arange(len(source)), None)
    return to_uint8(rows["x0"]), rows["cond"]["label"]


def _scaled(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


def _fit(sizes: list[Tensor], labels: Tensor, epochs: int, batch: int) -> SmallCNN:
    """Cross-entropy, AdamW, learning rate 2e-3 on a cosine; each batch comes at every size in turn."""
    torch.manual_seed(SEED)
    model = SmallCNN(channels=sizes[0].shape[1], width=32)
    steps = epochs * len(sizes) * (len(labels) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(labels))[: len(labels) // batch * batch].split(batch):
            for images in sizes:
                loss = nn.functional.cross_entropy(model(_scaled(images[rows])), labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return model.eval()


@torch.no_grad()
def _accuracy(model: SmallCNN, images: Tensor, labels: Tensor) -> float:
    guesses = torch.cat([model(_scaled(part)).argmax(1) for part in images.split(500)])
    return (guesses == labels).double().mean().item()


def _save(model: SmallCNN, train: Tensor, said: dict[str, str], name: str) -> None:
    model.standardise(_scaled(train))
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    shape = {"channels": str(train.shape[1]), "width": "32", "classes": "10"}
    metadata = {**shape, **said, "seed": str(SEED), "sha256": weights_digest(state), "licence": "Apache-2.0"}
    _write_tensors(state, f"features/{name}", metadata)
    print(name, metadata)


STEPS = {"digits": digits, "fashion_mnist": fashion_mnist, "digits-cnn": digits_cnn, "fashion-cnn": fashion_cnn}

if __name__ == "__main__":
    torch.set_num_threads(1)
    for step in sys.argv[1:] or STEPS:
        STEPS[step]()

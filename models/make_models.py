"""Train and export the small digits networks that lie in this folder.

Five networks are trained on scikit-learn's ``digits`` (1797 grey images of
8x8 pixels, 10 classes) with torch and exported to ONNX, together with the
arrays to evaluate and calibrate them. See README.md beside this file.

    python models/make_models.py [--only NAME ...] [--output FOLDER]

Needs torch, onnx, onnxscript, onnxruntime and scikit-learn.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

SEED = 20240
THREADS = 1  # two threads crawl where another process wants the same cores
CLASSES = 10
TEST_SAMPLES = 600
CALIBRATION_SAMPLES = 256
MAX_FILE_BYTES = 1_000_000
CHECKED_BATCH_SIZES = (1, 7)


# --- networks -----------------------------------------------------------------


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, projected where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False),
                nn.BatchNorm2d(outputs),
            )

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return functional.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """Residual network: three stages of two blocks, at 8x8, 4x4 and 2x2."""

    def __init__(self, widths: tuple[int, int, int] = (24, 40, 56)) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, widths[0], 3, padding=1, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(),
        )
        blocks: list[nn.Module] = []
        inputs = widths[0]
        for stage, outputs in enumerate(widths):
            blocks.append(ResidualBlock(inputs, outputs, stride=2 if stage else 1))
            blocks.append(ResidualBlock(outputs, outputs, stride=1))
            inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(inputs, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.blocks(self.stem(x)))
        logits: Tensor = self.head(x.flatten(1))
        return logits


class SqueezeExcite(nn.Module):
    """Channel gate: global average, two 1x1 convolutions, hard sigmoid."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.reduce = nn.Conv2d(channels, squeezed, 1)
        self.expand = nn.Conv2d(squeezed, channels, 1)
        self.gate = nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        gate = self.expand(functional.relu(self.reduce(self.pool(x))))
        gated: Tensor = x * self.gate(gate)
        return gated


class InvertedResidual(nn.Module):
    """Expand, depthwise convolution, optional gate, project, optional residual."""

    def __init__(
        self,
        inputs: int,
        expanded: int,
        outputs: int,
        *,
        kernel: int = 3,
        stride: int = 1,
        gated: bool = False,
        activation: Callable[[], nn.Module] = nn.Hardswish,
    ) -> None:
        super().__init__()
        self.residual = stride == 1 and inputs == outputs
        layers: list[nn.Module] = [
            nn.Conv2d(inputs, expanded, 1, bias=False),
            nn.BatchNorm2d(expanded),
            activation(),
            nn.Conv2d(
                expanded,
                expanded,
                kernel,
                stride,
                padding=kernel // 2,
                groups=expanded,
                bias=False,
            ),
            nn.BatchNorm2d(expanded),
            activation(),
        ]
        if gated:
            layers.append(SqueezeExcite(expanded, expanded // 4))
        layers += [nn.Conv2d(expanded, outputs, 1, bias=False), nn.BatchNorm2d(outputs)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return x + y if self.residual else y


class MobileNet(nn.Module):
    """Inverted residual network in the manner of MobileNetV3."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.Hardswish(),
        )
        self.blocks = nn.Sequential(
            InvertedResidual(16, 48, 16, activation=nn.ReLU6),
            InvertedResidual(16, 64, 24, stride=2, activation=nn.ReLU6),
            InvertedResidual(24, 96, 24, gated=True),
            InvertedResidual(24, 96, 24, kernel=5, gated=True),
            InvertedResidual(24, 128, 40, kernel=5, stride=2, gated=True),
            InvertedResidual(40, 160, 40, gated=True),
        )
        self.last = nn.Sequential(nn.Conv2d(40, 128, 1, bias=False), nn.BatchNorm2d(128), nn.Hardswish())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Sequential(nn.Linear(128, 128), nn.Hardswish(), nn.Linear(128, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.last(self.blocks(self.stem(x))))
        logits: Tensor = self.head(x.flatten(1))
        return logits


class DenseLayer(nn.Module):
    """BN, ReLU, 1x1 bottleneck, BN, ReLU, 3x3; appended to its own input."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, 2 * growth, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(2 * growth)
        self.conv2 = nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(functional.relu(self.bn1(x)))
        y = self.conv2(functional.relu(self.bn2(y)))
        return torch.cat([x, y], dim=1)


class DenseNet(nn.Module):
    """Concatenating network: three dense blocks, two transitions between them."""

    def __init__(self, stem: int = 24, growth: int = 16, layers: tuple[int, ...] = (3, 3, 3)) -> None:
        super().__init__()
        features: list[nn.Module] = [nn.Conv2d(1, stem, 3, padding=1, bias=False)]
        channels = stem
        for block, count in enumerate(layers):
            if block:
                features += [
                    nn.BatchNorm2d(channels),
                    nn.ReLU(),
                    nn.Conv2d(channels, channels // 2, 1, bias=False),
                    nn.AvgPool2d(2),
                ]
                channels //= 2
            for _ in range(count):
                features.append(DenseLayer(channels, growth))
                channels += growth
        features += [nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
        self.features = nn.Sequential(*features)
        self.head = nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(x).flatten(1))
        return logits


class MLP(nn.Module):
    """Three hidden layers, each Linear, BatchNorm, ReLU, on the 64 pixels."""

    def __init__(self, hidden: tuple[int, ...] = (256, 192, 128)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 64
        for width in hidden:
            layers += [nn.Linear(inputs, width), nn.BatchNorm1d(width), nn.ReLU()]
            layers.append(nn.Dropout(0.2))
            inputs = width
        self.layers = nn.Sequential(*layers, nn.Linear(inputs, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layers(x)
        return logits


class Conv1dNet(nn.Module):
    """1-D convolutions along the columns; the 8 image rows are the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv1d(8, 48, 3, padding=1, bias=False),
            nn.BatchNorm1d(48),
            nn.ReLU(),
            nn.Conv1d(48, 64, 3, padding=1, bias=False),
            nn.BatchNorm1d(64),
            nn.ReLU(),
            nn.MaxPool1d(2),
            nn.Conv1d(64, 64, 3, padding=1, bias=False),
            nn.BatchNorm1d(64),
            nn.LeakyReLU(0.1),
        )
        self.head = nn.Sequential(
            nn.Flatten(),
            nn.Linear(64 * 4, 128),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Linear(128, CLASSES),
        )

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(x))
        return logits


# --- what is made -------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How one network is built, fed, trained and exported."""

    name: str
    build: Callable[[], nn.Module]
    input_shape: tuple[int, ...]  # of one sample
    data: str  # stem of the names of the .npz files
    opset: int
    dynamo: bool = False  # torch.export's exporter, not the TorchScript one
    keep_batchnorm: bool = False  # do not let the exporter fold BN into Conv
    epochs: int = 25
    learning_rate: float = 4e-3


IMAGE = (1, 8, 8)

RECIPES = (
    Recipe("digits-resnet", ResNet, IMAGE, "digits-images", 13, keep_batchnorm=True),
    Recipe("digits-mobilenet", MobileNet, IMAGE, "digits-images", 14, epochs=30),
    Recipe("digits-densenet", DenseNet, IMAGE, "digits-images", 18, dynamo=True),
    Recipe("digits-mlp", MLP, (64,), "digits-mlp", 15, epochs=60),
    Recipe(
        "digits-conv1d",
        Conv1dNet,
        (8, 8),
        "digits-conv1d",
        17,
        keep_batchnorm=True,
        epochs=60,
    ),
)


@dataclass(frozen=True)
class Digits:
    """The digits, scaled to 0..1 and split, as images of shape (n, 1, 8, 8)."""

    train: FloatArray
    train_labels: IntArray
    test: FloatArray
    test_labels: IntArray
    calibration: FloatArray


@dataclass(frozen=True)
class Row:
    """One line of the printed table."""

    name: str
    accuracy: float
    parameters: int
    size: int
    opset: int
    ops: Counter[str]


def load() -> Digits:
    """Load the digits and split them, the same way each time."""
    bunch = load_digits()
    images = (bunch.images[:, None] / 16.0).astype(np.float32)
    labels = bunch.target.astype(np.int64)
    train, test, train_labels, test_labels = train_test_split(images, labels, test_size=TEST_SAMPLES, stratify=labels, random_state=SEED)
    calibration, _ = train_test_split(
        train,
        train_size=CALIBRATION_SAMPLES,
        stratify=train_labels,
        random_state=SEED,
    )
    return Digits(train, train_labels, test, test_labels, calibration)


def shift(images: Tensor, generator: torch.Generator) -> Tensor:
    """Move each image by up to one pixel each way, the usual augmentation."""
    count = len(images)
    padded = functional.pad(images[:, 0], (1, 1, 1, 1))
    offsets = torch.randint(0, 3, (2, count, 1), generator=generator)
    rows = (offsets[0] + torch.arange(8))[:, :, None]
    columns = (offsets[1] + torch.arange(8))[:, None, :]
    return padded[torch.arange(count)[:, None, None], rows, columns][:, None]


def train(recipe: Recipe, digits: Digits) -> nn.Module:
    """Train the recipe's network; the result depends on nothing but the seed."""
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    model = recipe.build()
    images = torch.from_numpy(digits.train)
    labels = torch.from_numpy(digits.train_labels)
    batch_size = 64
    steps = len(images) // batch_size  # the last, incomplete batch is left out
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=recipe.learning_rate,
        epochs=recipe.epochs,
        steps_per_epoch=steps,
    )
    model.train()
    for _ in range(recipe.epochs):
        order = torch.randperm(len(images), generator=generator)
        for step in range(steps):
            chosen = order[step * batch_size : (step + 1) * batch_size]
            batch = shift(images[chosen], generator)
            logits = model(batch.reshape(-1, *recipe.input_shape))
            loss = functional.cross_entropy(logits, labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return model.eval()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporters' deprecation notes and progress lines."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def export(recipe: Recipe, model: nn.Module, path: Path) -> None:
    """Export the network with a dynamic batch axis, then tidy the file."""
    example = torch.zeros(2, *recipe.input_shape)
    with quiet():
        if recipe.dynamo:
            torch.onnx.export(
                model,
                (example,),
                path,
                dynamo=True,
                opset_version=recipe.opset,
                input_names=["input"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                external_data=False,
                verbose=False,
            )
        else:
            mode = torch.onnx.TrainingMode
            torch.onnx.export(
                model,
                (example,),
                path,
                dynamo=False,
                opset_version=recipe.opset,
                input_names=["input"],
                output_names=["logits"],
                dynamic_axes={"input": {0: "batch"}, "logits": {0: "batch"}},
                training=mode.PRESERVE if recipe.keep_batchnorm else mode.EVAL,
                do_constant_folding=not recipe.keep_batchnorm,
            )
    proto = onnx.load(path)
    strip(proto)
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, path)


def strip(proto: onnx.ModelProto) -> None:
    """Drop stack traces and the like: they hold paths of the making machine."""
    graph = proto.graph
    for item in (
        graph,
        *graph.node,
        *graph.initializer,
        *graph.value_info,
        *graph.input,
        *graph.output,
    ):
        item.ClearField("doc_string")
        item.ClearField("metadata_props")
    proto.ClearField("doc_string")
    proto.ClearField("metadata_props")


def measure(recipe: Recipe, digits: Digits, path: Path) -> Row:
    """Run the file with onnxruntime on the test set and at odd batch sizes."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = THREADS
    session = ort.InferenceSession(path, sess_options=options, providers=["CPUExecutionProvider"])
    inputs = digits.test.reshape(-1, *recipe.input_shape)
    (logits,) = session.run(["logits"], {"input": inputs})
    for size in CHECKED_BATCH_SIZES:
        (part,) = session.run(["logits"], {"input": inputs[:size]})
        np.testing.assert_allclose(part, logits[:size], rtol=1e-3, atol=1e-4)
    proto = onnx.load(path)
    parameters = sum(int(np.prod(tensor.dims)) for tensor in proto.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT)
    return Row(
        name=recipe.name,
        accuracy=float((logits.argmax(axis=1) == digits.test_labels).mean()),
        parameters=parameters,
        size=path.stat().st_size,
        opset=next(o.version for o in proto.opset_import if o.domain == ""),
        ops=Counter(node.op_type for node in proto.graph.node),
    )


def save_arrays(recipe: Recipe, digits: Digits, folder: Path) -> list[Path]:
    """Write the evaluation and the calibration arrays in the network's shape."""
    shape = (-1, *recipe.input_shape)
    evaluation = folder / f"{recipe.data}.eval.npz"
    calibration = folder / f"{recipe.data}.calibration.npz"
    np.savez_compressed(evaluation, input=digits.test.reshape(shape), labels=digits.test_labels)
    np.savez_compressed(calibration, input=digits.calibration.reshape(shape))
    return [evaluation, calibration]


def make(recipe: Recipe, digits: Digits, folder: Path) -> Row:
    """Train, export and measure one network and write its arrays."""
    path = folder / f"{recipe.name}.onnx"
    export(recipe, train(recipe, digits), path)
    for written in [path, *save_arrays(recipe, digits, folder)]:
        if written.stat().st_size >= MAX_FILE_BYTES:
            raise SystemExit(f"{written} has grown past {MAX_FILE_BYTES} bytes")
    return measure(recipe, digits, path)


def table(rows: list[Row]) -> str:
    """Lay the rows out as a Markdown table."""
    lines = [
        "| model | accuracy | parameters | file size (bytes) | opset |",
        "|---|---:|---:|---:|---:|",
    ]
    lines += [f"| {row.name} | {row.accuracy:.2%} | {row.parameters:,} | {row.size:,} | {row.opset} |" for row in rows]
    return "\n".join(lines)


def main() -> None:
    """Make the files asked for and print what they measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only",
        metavar="NAME",
        action="append",
        choices=[recipe.name for recipe in RECIPES],
        help="make this network only (may be repeated): %(choices)s",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).resolve().parent,
        metavar="FOLDER",
        help="where to write (default: the folder of this script)",
    )
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)

    digits = load()
    rows = []
    for recipe in RECIPES:
        if arguments.only and recipe.name not in arguments.only:
            continue
        start = time.perf_counter()
        row = make(recipe, digits, arguments.output)
        rows.append(row)
        ops = ", ".join(f"{op} {count}" for op, count in sorted(row.ops.items()))
        print(f"{row.name}: {time.perf_counter() - start:.0f} s; {ops}")
    print()
    print(table(rows))


if __name__ == "__main__":
    main()

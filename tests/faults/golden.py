"""Makes the golden checkpoint of this version: `python tests/faults/golden.py`, once per released version.

It holds a data set, a run of four steps whose second checkpoint is kept, and what the last two steps and the model's
logits were. `test_golden.py` continues every one of them, for ever.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch

from arfast.data import Document, prepare_dataset
from arfast.models import CausalLM, CausalLMConfig
from arfast.train import TrainConfig, Trainer

FOLDER = Path(__file__).parent / "golden"
SIZES = dict(vocab_size=264, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
MODELS = {
    "llama": CausalLMConfig(**SIZES),
    "experts": CausalLMConfig(**SIZES, num_experts=2, num_shared_experts=1, router_score="sigmoid"),
}
SETTINGS = {"seqlen": 16, "batch_size": 2, "max_steps": 4, "save_every": 2, "keep_last": 0, "progress": False}
KEPT, STEPS = 2, 4
IDS = [[3, 70, 71, 72, 90, 255]]


def settings(name):
    return SETTINGS | {"dtype": "bfloat16" if name == "experts" else "float32"}


def losses(output_dir):
    """Of the steps after the kept checkpoint."""
    rows = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row and row["step"] > KEPT]


@torch.no_grad()
def logits(path):
    """Of some positions, [4, 5]."""
    model = CausalLM.from_pretrained(path, dtype=torch.float32)
    return model(torch.tensor(IDS)).logits[0, -4:, 100:105].tolist()


def make(version):
    target = FOLDER / version
    shutil.rmtree(target, ignore_errors=True)
    documents = [Document(f"text {i} of a small corpus, " * 3, source=str(i)) for i in range(24)]
    prepare_dataset(documents, target / "data", vocab_size=SIZES["vocab_size"])
    expected = {}
    for name, config in MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "run"
            Trainer(CausalLM(config, seed=1), TrainConfig(output_dir=output, **settings(name)), target / "data").fit()
            checkpoint = output / f"step-{KEPT:08d}"
            shutil.copytree(checkpoint, target / name / checkpoint.name)
            expected[name] = {"losses": losses(output), "logits": logits(checkpoint)}
    (target / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    from importlib.metadata import version

    torch.set_num_threads(1)
    make(sys.argv[1] if len(sys.argv) > 1 else version("arfast"))

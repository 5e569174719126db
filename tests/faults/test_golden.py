"""C8: checkpoints of every version that was released load and continue, or name the version that can."""

import json
import shutil

import golden
import pytest
import torch
from train_doubles import make_trainer

from arfast.models import CausalLM
from arfast.train import CheckpointError, TrainConfig, Trainer, verify
from arfast.train.manifest import _serialize

VERSIONS = sorted(path.name for path in golden.FOLDER.iterdir())


@pytest.fixture(params=VERSIONS)
def version(request, tmp_path):
    """A copy: a run goes on in the directory of its checkpoint."""
    shutil.copytree(golden.FOLDER / request.param, tmp_path / request.param)
    return tmp_path / request.param


@pytest.mark.parametrize("name", golden.MODELS)
def test_continues(version, name, record):
    expected = json.loads((version / "expected.json").read_text())[name]
    run, checkpoint = version / name, version / name / f"step-{golden.KEPT:08d}"
    verify(checkpoint)
    # Other instruction sets round differently; anything that is read wrongly is wrong in the first digit.
    torch.testing.assert_close(golden.logits(checkpoint), expected["logits"], rtol=1e-4, atol=1e-5)
    model = CausalLM(CausalLM.from_pretrained(checkpoint).config, seed=9)
    config = TrainConfig(output_dir=run, **golden.settings(name))
    trainer = Trainer(model, config, version / "data")
    assert trainer.fit().step == golden.STEPS
    losses = golden.losses(run)
    assert len(losses) == golden.STEPS - golden.KEPT
    tolerance = 1e-4 if config.dtype == "float32" else 1e-2
    torch.testing.assert_close(losses, expected["losses"], rtol=tolerance, atol=0)
    record("C8", f"golden checkpoint of version {version.name} ({name})", 1, "loads, same logits, continues as it did")


def test_a_format_of_the_future(tmp_path, record):
    trainer = make_trainer(tmp_path)
    path = trainer.save()
    for file, match in (("manifest.json", "must have version 1, got 99"), ("trainer_state.json", "version .*, got 99")):
        original = (path / file).read_bytes()
        content = json.loads(original)
        content.pop("checksum", None)
        content["version"] = 99
        (path / file).write_bytes(_serialize(content) if file == "manifest.json" else json.dumps(content).encode())
        with pytest.raises(CheckpointError, match=match):
            verify(path)
            trainer._load(path)
        (path / file).write_bytes(original)
        if file == "manifest.json":
            # The state is behind the manifest: make one that fits.
            (path / "manifest.json").write_bytes(without_digest(original, "trainer_state.json"))
    record("C8", "a manifest and a state of version 99", 2, "refused, naming both versions")


def without_digest(manifest, name):
    content = json.loads(manifest)
    content.pop("checksum")
    del content["files"][name]
    return _serialize(content)

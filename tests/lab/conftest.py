"""Studies from the command line; a run that has learned to count, with the data set that it has learned from."""

import json

import pytest

from arfast import CausalLM, CausalLMConfig, TrainConfig, Trainer
from arfast.cli.main import main
from arfast.data import Document, Tokenizer, prepare_dataset

NUMBERS = "one two three four five six seven eight nine ten eleven twelve".split()


@pytest.fixture
def lab(request, capsys):
    """Runs the module's STUDY: (what it prints, its result), or the message with which it ends with another status."""

    def run(*arguments, status=0):
        capsys.readouterr()
        assert main(["lab", request.module.STUDY, *map(str, arguments)]) == status
        captured = capsys.readouterr()
        return captured.err if status else (captured.out, json.loads(captured.out.splitlines()[-1]))

    return run


@pytest.fixture(scope="session")
def counting_run(tmp_path_factory):
    path = tmp_path_factory.mktemp("counting") / "run"
    lines = [" ".join(NUMBERS[(k + i) % 12] for i in range(4)) + "\n" for k in range(12)]
    documents = [
        Document(f"list {k}\n" + "".join(lines[(k + 4 * i) % 12] for i in range(60)), str(k)) for k in range(60)
    ]
    fractions = dict(validation_fraction=0.1, test_fraction=0.25)
    prepare_dataset(documents, path / "data", vocab_size=300, **fractions)
    config = CausalLMConfig.preset(
        "tiny", vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    settings = TrainConfig(
        output_dir=str(path), max_steps=80, batch_size=4, seqlen=128, learning_rate=3e-3, progress=False
    )
    Trainer(CausalLM(config), settings, path / "data", Tokenizer.load(path / "data")).fit()
    return path

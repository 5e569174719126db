"""C10, S1, S2, S3: whatever a directory holds, it loads or is refused in a sentence; nothing runs, nothing is opened
outside, nothing large is allocated."""

import contextlib
import functools
import json
import os
import shutil

import pytest
import torch
from hostile import REFUSALS, attempt, fuzz, mutate_json, watched
from mutations import FILE_NAMES, VALUES, mutate_bytes, mutate_safetensors, mutate_value, to_json
from train_doubles import make_trainer

from arfast.data import Tokenizer
from arfast.distributed import sharded_checkpoint
from arfast.models import CausalLM, CausalLMConfig
from arfast.train import CheckpointError, state, verify
from arfast.train.manifest import _serialize

CONFIG = CausalLMConfig(vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
EXPERTS = CONFIG.replace(num_experts=4, num_shared_experts=1, router_score="sigmoid", sliding_window=4)


@pytest.fixture
def model_directories(memory_path):
    """A single file, shards with an index, and experts in our own format; each has been loaded once."""
    paths = [memory_path / name for name in ("single", "sharded", "experts")]
    CausalLM(CONFIG).save_pretrained(paths[0])
    CausalLM(CONFIG).save_pretrained(paths[1], max_shard_bytes=8000)
    CausalLM(EXPERTS).save_pretrained(paths[2])
    for path in paths:
        CausalLM.from_pretrained(path)
    return paths


def mutate_index(generator, data):
    value = json.loads(data)
    if generator.random() < 0.7:
        weight_map = value["weight_map"]
        for _ in range(generator.randint(1, 3)):
            weight_map[generator.choice(list(weight_map))] = generator.choice((*FILE_NAMES, *VALUES))
        return to_json(generator, value)
    return mutate_json(generator, data)


def test_safetensors_headers(model_directories, amount, record):
    count, refused = amount(300, 100_000), 0
    for i, directory in enumerate(model_directories):
        names = [path.name for path in directory.glob("*.safetensors")]
        refused += fuzz(directory, names, mutate_safetensors, CausalLM.from_pretrained, count // 3, seed=i)
    assert refused > 0.9 * (3 * (count // 3))
    record("C10", "hostile safetensors headers and bodies", 3 * (count // 3), f"{refused} refused, the rest harmless")


def test_configurations(model_directories, amount, record):
    count, refused = amount(200, 100_000), 0
    for i, directory in enumerate(model_directories):
        refused += fuzz(directory, ["config.json"], mutate_json, CausalLM.from_pretrained, count // 3, seed=10 + i)
    assert refused > 0.5 * count
    record("C10", "hostile config.json", 3 * (count // 3), f"{refused} refused, the rest harmless")


def test_indices(model_directories, amount, record):
    count = amount(100, 100_000)
    name = "model.safetensors.index.json"
    refused = fuzz(model_directories[1], [name], mutate_index, CausalLM.from_pretrained, count, seed=20)
    assert refused > 0.9 * count
    record("C10", "hostile model.safetensors.index.json", count, f"{refused} refused, the rest harmless")


@pytest.mark.parametrize("name", FILE_NAMES)
def test_shard_names(model_directories, name, record):
    directory = model_directories[1]
    file = directory / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["lm_head.weight"] = name
    file.write_text(json.dumps(index))
    with watched(directory), pytest.raises(REFUSALS):
        CausalLM.from_pretrained(directory)
    record("S3", "shard names that leave the directory or are none", len(FILE_NAMES), "refused, nothing opened")


def mutate_manifest(generator, data):
    """Half of them with a right checksum, as somebody would make it who knows how."""
    if generator.random() < 0.3:
        return mutate_bytes(generator, data)
    content = json.loads(data)
    content.pop("checksum")
    for _ in range(generator.randint(1, 3)):
        content = mutate_value(generator, content)
    if isinstance(content, dict) and generator.random() < 0.8:
        with contextlib.suppress(UnicodeEncodeError):
            return _serialize(content)
    return to_json(generator, content)


def test_manifests(checkpoint, amount, record):
    trainer, path = checkpoint
    count = amount(300, 100_000)
    refused = fuzz(path, ["manifest.json"], mutate_manifest, verify, count, seed=30)
    assert refused > 0.8 * count
    record("C10", "hostile manifests, most with a right checksum", count, f"{refused} refused, the rest harmless")


READERS = {
    "one process": state.load_engine,
    "a rank": functools.partial(sharded_checkpoint.load_engine, rank=0, num_ranks=1),
}


@pytest.fixture
def checkpoint(memory_path):
    """Of a step; every reader takes it."""
    trainer = make_trainer(memory_path / "run", model=CausalLM(CONFIG.replace(vocab_size=61)))
    trainer.step([trainer.datasets["train"].batch(0, 4)])
    path = trainer.save()
    for load_engine in READERS.values():
        load_engine(trainer.engine, path)
    return trainer, path


@pytest.mark.parametrize("reader", READERS)
def test_weights_of_another_model(checkpoint, reader):
    """Where no tensor of the optimizer tells, the weights do, before one of them is taken over."""
    trainer, path = checkpoint
    (path / "optimizer.safetensors").unlink()
    CausalLM(CONFIG.replace(vocab_size=62)).save_pretrained(path)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    with pytest.raises(CheckpointError, match=r"must hold .+ of shape \(61, .+\), got \(62, "):
        READERS[reader](trainer.engine, path)
    assert all(map(torch.equal, trainer.model.parameters(), before))


@pytest.mark.parametrize("reader", READERS)
def test_states_and_optimizers(checkpoint, amount, record, reader):
    """As if the manifest were right: the state, the optimizer's tensors and the random states are mutated."""
    trainer, path = checkpoint
    count = amount(200, 100_000)

    def load(directory):
        before = [p.detach().clone() for p in trainer.model.parameters()], vars(trainer.state).copy()
        try:
            READERS[reader](trainer.engine, directory)
        except CheckpointError:
            assert vars(trainer.state) == before[1] and all(map(torch.equal, trainer.model.parameters(), before[0]))
            raise
        counters = trainer.engine.state
        assert type(counters.next_position()) is int
        assert all(type(value) is float for value in counters.recent_losses + counters.recent_grad_norms)

    def mutate(generator, data):
        return mutate_json(generator, data) if data.startswith(b"{") else mutate_safetensors(generator, data)

    names = ["trainer_state.json", "optimizer.safetensors", "rng.safetensors"]
    refused = fuzz(path, names, mutate, load, count, seed=40)
    assert 0.5 * count < refused < count
    record("C10", f"hostile trainer_state.json, optimizer, random states (read by {reader})", count,
           f"{refused} refused with the trainer unchanged, the rest harmless")  # fmt: skip


def test_tokenizers(memory_path, amount, record):
    count = amount(300, 100_000)
    Tokenizer.train(["some text to learn from, some text"] * 5, vocab_size=270).save(memory_path)
    Tokenizer.load(memory_path)
    names = ["tokenizer.json", "tokenizer_config.json"]

    def use(directory):
        tokenizer = Tokenizer.load(directory)
        for text in ("some text", "", "ü<|pad|>\n"):
            ids = tokenizer.encode(text)
            assert all(0 <= token < tokenizer.vocab_size for token in ids)
            tokenizer.decode(ids)
            tokenizer.decode_batch(tokenizer.encode_batch([text, text]))

    refused = fuzz(memory_path, names, mutate_json, use, count, seed=50)
    assert refused > 0.3 * count
    record("S6", "hostile tokenizer.json and tokenizer_config.json", count, f"{refused} refused, the rest harmless")


def test_a_million_tensors(memory_path, record):
    """A valid file whose header alone has 70 MB is refused before it is parsed."""
    CausalLM(CONFIG).save_pretrained(memory_path)
    entry = '"%07d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    text = ("{" + ",".join(entry % i for i in range(10**6)) + "}").encode()
    (memory_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    assert attempt(CausalLM.from_pretrained, memory_path, "a million tensors") == 1
    record("C10", "a header of a million tensors", 1, "refused before it is parsed")


def test_a_narrow_file_does_not_become_a_wide_model(tmp_path, record):
    """The embedding in float64 makes the model float64: eight times the bytes of what else is stored in a byte."""
    from safetensors.torch import load_file, save_file

    config = CausalLMConfig(
        vocab_size=2, hidden_size=2048, intermediate_size=4096, num_hidden_layers=1, num_attention_heads=2
    )
    CausalLM(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].double()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="dtype must be given for tensors of .* that would become .* of torch.float64"):
        CausalLM.from_pretrained(tmp_path)
    CausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    record("S2", "a file that would take four times its size in memory", 1, "refused before it is allocated")


@pytest.mark.parametrize("kind", ["pipe", "directory", "link to a directory", "dangling link", "link outside"])
def test_files_that_are_none(model_directories, kind, record):
    """Of each file of a model directory; a pipe would wait for ever if it were opened."""
    directory = model_directories[1]
    names = sorted(os.listdir(directory))
    for name in names:
        file = directory / name
        aside = shutil.move(file, directory.parent / name)
        if kind == "pipe":
            os.mkfifo(file)
        elif kind == "directory":
            file.mkdir()
        else:
            target = {"link to a directory": "/", "dangling link": "nowhere", "link outside": aside}[kind]
            file.symlink_to(target)
        with watched(directory), pytest.raises(REFUSALS):
            CausalLM.from_pretrained(directory)
        file.rmdir() if file.is_dir() and not file.is_symlink() else file.unlink()
        shutil.move(aside, file)
    CausalLM.from_pretrained(directory)
    record("C10", f"a {kind} in place of each file of a model", len(names), "refused without opening it")

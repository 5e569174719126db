"""C10, S1, S2, S3: whatever a directory holds, it loads or is refused in a sentence; nothing runs, nothing is opened
outside, nothing large is allocated."""

import contextlib
import json
import os
import random
import resource
import shutil
import sys
import time
import warnings

import pytest
import torch
from mutations import FILE_NAMES, VALUES, mutate_bytes, mutate_safetensors, mutate_value, to_json
from train_doubles import make_trainer

from arfast.data import Tokenizer
from arfast.models import CausalLM, CausalLMConfig
from arfast.train import CheckpointError, verify
from arfast.train.manifest import _serialize
from arfast.train.state import load_engine

CONFIG = CausalLMConfig(vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
EXPERTS = CONFIG.replace(num_experts=4, num_shared_experts=1, router_score="sigmoid", sliding_window=4)
REFUSALS = (ValueError, FileNotFoundError, CheckpointError)
LIMIT_SECONDS, LIMIT_BYTES = 1.0, 64 << 20
# Events of sys.addaudithook that nothing in a file may bring about; "open" is looked at by path.
FORBIDDEN = tuple(
    "exec compile socket. subprocess. os.system os.exec os.fork os.posix_spawn pickle. marshal. ctypes.dlopen "
    "os.putenv os.remove os.rename os.mkdir os.chmod urllib.".split()
)

_watched, _violations = [], []


def _audit(event, arguments):
    if not _watched:
        return
    if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
        if not os.path.realpath(os.fspath(arguments[0])).startswith(_watched[-1]):
            _violations.append((event, arguments))
    elif event.startswith(FORBIDDEN) and "<frozen" not in str(arguments):
        _violations.append((event, str(arguments)[:200]))


sys.addaudithook(_audit)


@contextlib.contextmanager
def watched(directory):
    """Nothing that is forbidden happens in here, and no file outside the directory is opened."""
    _watched.append(os.path.realpath(directory))
    try:
        yield
    finally:
        _watched.pop()
    assert not _violations, _violations


def attempt(load, directory, describe):
    """Load; 1 if it was refused. One line, within the time and the memory that the bars allow."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.thread_time()
    try:
        with watched(directory), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load(directory)
        refused = 0
    except REFUSALS as error:
        refused = 1
        assert "\n" not in str(error) and len(str(error)) < 1500, (describe, str(error))
    seconds = time.thread_time() - start
    growth = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert seconds < LIMIT_SECONDS, (describe, seconds)
    assert growth <= LIMIT_BYTES, (describe, growth)
    return refused


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


def fuzz(directory, names, mutate, load, count, seed):
    """Load variants of one file at a time; returns how many were refused."""
    originals = {name: (directory / name).read_bytes() for name in names}
    generator, refused = random.Random(seed), 0
    for i in range(count):
        name = generator.choice(names)
        data = mutate(generator, originals[name])
        (directory / name).write_bytes(data)
        refused += attempt(load, directory, f"seed {seed}, input {i}, {name}")
        (directory / name).write_bytes(originals[name])
    return refused


def mutate_json(generator, data):
    if generator.random() < 0.3:
        return mutate_bytes(generator, data)
    value = json.loads(data)
    for _ in range(generator.randint(1, 3)):
        value = mutate_value(generator, value)
    return to_json(generator, value)


def mutate_index(generator, data):
    value = json.loads(data)
    if generator.random() < 0.7:
        weight_map = value["weight_map"]
        for _ in range(generator.randint(1, 3)):
            weight_map[generator.choice(list(weight_map))] = generator.choice((*FILE_NAMES, *VALUES))
        return to_json(generator, value)
    return mutate_json(generator, data)


def test_safetensors_headers(model_directories, amount, record):
    count, refused = amount(300, 40_000), 0
    for i, directory in enumerate(model_directories):
        names = [path.name for path in directory.glob("*.safetensors")]
        refused += fuzz(directory, names, mutate_safetensors, CausalLM.from_pretrained, count // 3, seed=i)
    assert refused > 0.9 * (3 * (count // 3))
    record("C10", "hostile safetensors headers and bodies", 3 * (count // 3), f"{refused} refused, the rest harmless")


def test_configurations(model_directories, amount, record):
    count, refused = amount(200, 30_000), 0
    for i, directory in enumerate(model_directories):
        refused += fuzz(directory, ["config.json"], mutate_json, CausalLM.from_pretrained, count // 3, seed=10 + i)
    assert refused > 0.5 * count
    record("C10", "hostile config.json", 3 * (count // 3), f"{refused} refused, the rest harmless")


def test_indices(model_directories, amount, record):
    count = amount(100, 10_000)
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


@pytest.fixture
def checkpoint(memory_path):
    trainer = make_trainer(memory_path / "run")
    trainer.step([trainer.datasets["train"].batch(0, 4)])
    path = trainer.save()
    load_engine(trainer.engine, path)
    return trainer, path


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
    count = amount(300, 20_000)
    refused = fuzz(path, ["manifest.json"], mutate_manifest, verify, count, seed=30)
    assert refused > 0.8 * count
    record("C10", "hostile manifests, most with a right checksum", count, f"{refused} refused, the rest harmless")


def test_states_and_optimizers(checkpoint, amount, record):
    """As if the manifest were right: the state, the optimizer's tensors and the random states are mutated."""
    trainer, path = checkpoint
    count = amount(200, 10_000)

    def load(directory):
        before = [p.detach().clone() for p in trainer.model.parameters()], vars(trainer.state).copy()
        try:
            load_engine(trainer.engine, directory)
        except CheckpointError:
            assert vars(trainer.state) == before[1] and all(map(torch.equal, trainer.model.parameters(), before[0]))
            raise

    def mutate(generator, data):
        return mutate_json(generator, data) if data.startswith(b"{") else mutate_safetensors(generator, data)

    names = ["trainer_state.json", "optimizer.safetensors", "rng.safetensors"]
    refused = fuzz(path, names, mutate, load, count, seed=40)
    assert refused > 0.5 * count
    record("C10", "hostile trainer_state.json, optimizer, random states", count,
           f"{refused} refused with the trainer unchanged, the rest harmless")  # fmt: skip


def test_tokenizers(memory_path, amount, record):
    count = amount(100, 10_000)
    Tokenizer.train(["some text to learn from, some text"] * 5, vocab_size=270).save(memory_path)
    Tokenizer.load(memory_path)
    names = ["tokenizer.json", "tokenizer_config.json"]
    refused = fuzz(memory_path, names, mutate_json, Tokenizer.load, count, seed=50)
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

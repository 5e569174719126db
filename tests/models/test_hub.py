"""Model directories: our own format, and files that are damaged or hostile."""

import json
import os
import struct
import sys
from random import Random

import pytest
import torch
from safetensors.torch import load_file, save_file

from arfast.models import CausalLM, CausalLMConfig

CONFIG = CausalLMConfig(
    vocab_size=31,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=64,
)
SHARED = CONFIG.replace(num_experts=4, num_shared_experts=1, router_score="sigmoid", mlp_only_layers=(0,))
ALTERNATING = CONFIG.replace(sliding_window=4, layer_types=("sliding_attention", "full_attention"))


@pytest.fixture
def directory(tmp_path):
    CausalLM(CONFIG).save_pretrained(tmp_path)
    return tmp_path


def edit_config(directory, **changes):
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def assert_refused(directory, message, error=ValueError):
    with pytest.raises(error) as caught:
        CausalLM.from_pretrained(directory)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("config", [SHARED, ALTERNATING], ids=["shared-experts", "alternating-window"])
def test_own_format(config, tmp_path):
    """What no family of Hugging Face expresses is written with all fields, and comes back."""
    model = CausalLM(config, seed=5)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["ArfastForCausalLM"]
    again = CausalLM.from_pretrained(tmp_path)
    assert again.config == config
    for (name, a), b in zip(model.named_parameters(), again.parameters()):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype(stored, tmp_path):
    CausalLM(CONFIG, dtype=stored).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == str(stored).removeprefix("torch.")
    assert {p.dtype for p in CausalLM.from_pretrained(tmp_path).parameters()} == {stored}
    model = CausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_tied_head_is_written_once(tmp_path):
    model = CausalLM(CONFIG.replace(tie_word_embeddings=True))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    assert CausalLM.from_pretrained(tmp_path).lm_head is None  # a redundant copy is fine
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    assert_refused(tmp_path, "lm_head.weight must equal model.embed_tokens.weight when tied, got another")


def test_saving_replaces_the_other_layout(directory):
    """A single file left beside shards would be read instead of them."""
    sharded = CausalLM(CONFIG, seed=1)
    sharded.save_pretrained(directory, max_shard_bytes=4000)
    assert not (directory / "model.safetensors").exists()
    assert torch.equal(CausalLM.from_pretrained(directory).head_weight, sharded.head_weight)
    (directory / "tokenizer.json").write_text("{}")
    (directory / ".model.safetensors.1.tmp").write_text("left by a killed process")
    CausalLM(CONFIG, seed=2).save_pretrained(directory)
    assert sorted(file.name for file in directory.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_a_failed_save_leaves_the_old_files(directory, monkeypatch):
    before = {file.name: file.read_bytes() for file in directory.iterdir()}

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("arfast.hub.os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        CausalLM(CONFIG, seed=9).save_pretrained(directory)
    assert {file.name: file.read_bytes() for file in directory.iterdir()} == before


def test_saving_over_something_else(directory, tmp_path_factory):
    def assert_refused(path, message, model=None, **options):
        with pytest.raises(ValueError, match=f"save_pretrained: {message}"):
            (model or CausalLM(CONFIG)).save_pretrained(path, **options)

    assert_refused(directory, "max_shard_bytes must be a positive integer, got 0", max_shard_bytes=0)
    assert_refused(directory, "model must hold weights", model=CausalLM(CONFIG, device="meta"))
    assert_refused(directory / "config.json", "path must be a directory, got the file")
    (directory / "config.json").unlink()
    (directory / "config.json").mkdir()
    assert_refused(directory, "config.json must be a regular file or absent")
    (directory / "config.json").rmdir()
    (directory / "model.safetensors").unlink()
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "file"
    (directory / "model.safetensors").symlink_to(elsewhere)
    assert_refused(directory, "model.safetensors must be a regular file or absent")
    assert not elsewhere.exists()


def test_files_are_readable_by_others(directory):
    modes = {file.name: file.stat().st_mode & 0o777 for file in directory.iterdir()}
    assert len(set(modes.values())) == 1, modes


def test_absent(tmp_path):
    assert_refused(tmp_path / "nothing", "path must be an existing directory", FileNotFoundError)
    assert_refused(tmp_path, "path must contain config.json", FileNotFoundError)
    CausalLM(CONFIG).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    assert_refused(tmp_path, "path must contain model.safetensors", FileNotFoundError)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "config.json: model_type must be one of llama, mistral, qwen2, qwen3, mixtral"),
        ({"model_type": ["llama"]}, "config.json: model_type must be one of"),
        ({"hidden_size": None}, "config.json: hidden_size must be present"),
        ({"hidden_act": "gelu"}, "config.json: hidden_act must be 'silu', got 'gelu'"),
        ({"mlp_bias": True}, "config.json: mlp_bias must be False, got True"),
        ({"quantization_config": {"bits": 4}}, "config.json: quantization_config must be None, got {'bits': 4}"),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, "config.json: rope_type must be default, linear or llama3"),
        ({"rope_scaling": {"type": "linear"}}, "CausalLMConfig: rope_scaling['factor'] must be a positive number"),
        ({"rope_scaling": [1]}, "config.json: rope_parameters must be an object, got [1]"),
        ({"vocab_size": 2**62}, "CausalLMConfig: vocab_size must be an integer in [1, 2147483647]"),
        ({"num_attention_heads": 0}, "CausalLMConfig: num_attention_heads must be an integer in"),
        ({"num_hidden_layers": 4096}, "num_hidden_layers must fit the 21 stored tensors, got 4096"),
        ({"num_hidden_layers": 10**30}, "CausalLMConfig: num_hidden_layers must be an integer in [1, 4096]"),
        (
            {"hidden_size": 2**20, "head_dim": 2**12},
            "wrong shape or dtype: model.embed_tokens.weight [31, 16] instead of",
        ),
        ({"model_type": "mixtral", "num_local_experts": 2**14}, "must be those of MixtralForCausalLM, got missing: "),
        ({"model_type": "qwen2"}, "missing: model.layers.0.self_attn.q_proj.bias, "),
        ({"tie_word_embeddings": True}, "lm_head.weight must equal model.embed_tokens.weight"),
        ({"num_hidden_layers": 1}, "unexpected: model.layers.1.input_layernorm.weight, "),
        ({"num_key_value_heads": 1}, "model.layers.0.self_attn.k_proj.weight [16, 16] instead of [8, 16]"),
    ],
)
def test_wrong_config(directory, changes, message):
    edit_config(directory, **changes)
    assert_refused(directory, message)


def test_config_keys_are_only_data(directory, monkeypatch):
    """Keys that other libraries turn into code or files do nothing here; they are named once in a warning."""
    opened = []
    sys.addaudithook(lambda event, args: opened.append((event, args)) if event in ("import", "exec") else None)
    edit_config(
        directory, auto_map={"AutoConfig": "evil.Config"}, _attn_implementation_internal="evil/repo", dtype="os"
    )
    opened.clear()
    with pytest.warns(UserWarning, match="unknown keys are not used: _attn_implementation_internal, auto_map"):
        CausalLM.from_pretrained(directory)
    assert not any("evil" in str(event) for event in opened)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config.json must be valid JSON"),
        ("[1]", "config.json must hold a JSON object, got list"),
        ("[" * 100_000, "config.json must be valid JSON"),
        ('{"a": 1, "a": 2}', "config.json must be valid JSON, got a key that occurs twice"),
        ('{"vocab_size": ' + "9" * 5000 + "}", "config.json must be valid JSON"),
        (" " * (2**20 + 1), "config.json must have at most 1048576 bytes, got 1048577"),
        ("\x00\xff", "config.json must be valid JSON"),
    ],
)
def test_damaged_config(directory, text, message):
    (directory / "config.json").write_text(text, encoding="latin-1")
    assert_refused(directory, message)


def test_truncated_tensors(directory):
    file = directory / "model.safetensors"
    data = file.read_bytes()
    for size in [0, 1, 7, 8, 9, 100, *range(500, len(data), 997), len(data) - 1]:
        file.write_bytes(data[:size])
        assert_refused(directory, "model.safetensors must be a complete safetensors file")


def header_of(data: bytes) -> tuple[dict, bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


@pytest.mark.parametrize("shape", [[2**31, 2**33], [2**62, 4], [31, 2**60], [-1, 16], [31], [16, 31], [31, 16, 1]])
def test_hostile_shapes(directory, shape):
    file = directory / "model.safetensors"
    header, body = header_of(file.read_bytes())
    header["model.embed_tokens.weight"]["shape"] = shape
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + body)
    assert_refused(directory, "from_pretrained: ")


def test_hostile_header_length(directory):
    file = directory / "model.safetensors"
    data = file.read_bytes()
    for length in (2**64 - 1, 2**63, 10**9, len(data)):
        file.write_bytes(struct.pack("<Q", length) + data[8:])
        assert_refused(directory, "model.safetensors must be a complete safetensors file")


def test_integer_tensors(directory):
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int32)
    save_file(tensors, directory / "model.safetensors")
    assert_refused(directory, "wrong shape or dtype: model.norm.weight of dtype I32")


def test_missing_and_unexpected_in_one_sentence(directory):
    tensors = load_file(directory / "model.safetensors")
    for name in [name for name in tensors if "layers.1" in name]:
        tensors[name.replace("layers.1", "layers.7")] = tensors.pop(name)
    tensors["model.norm.weight"] = torch.ones(3)
    save_file(tensors, directory / "model.safetensors")
    assert_refused(directory, "and 4 more; unexpected: model.layers.7.")
    assert_refused(directory, "wrong shape or dtype: model.norm.weight [3] instead of [16]")


def test_buffers_of_old_files_are_skipped(directory):
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, directory / "model.safetensors")
    CausalLM.from_pretrained(directory)


@pytest.mark.filterwarnings("ignore:config.json")
def test_random_damage(sharded):
    """Whatever is overwritten or cut, the directory loads or is refused in one sentence."""
    original = {file: file.read_bytes() for file in sorted(sharded.iterdir())}
    random = Random(0)
    refused = 0
    for _ in range(300):
        file, data = random.choice(list(original.items()))
        damaged = bytearray(data)
        if random.random() < 0.2:
            del damaged[random.randrange(len(data)) :]
        for _ in range(random.randint(1, 6) if damaged else 0):
            damaged[random.randrange(min(len(damaged), 900))] = random.randrange(256)
        file.write_bytes(damaged)
        try:
            CausalLM.from_pretrained(sharded)
        except (ValueError, FileNotFoundError) as error:
            refused += 1
            assert "\n" not in str(error)
            assert str(error).startswith(("from_pretrained: ", "config.json: ", "CausalLMConfig: "))
        file.write_bytes(data)
    assert refused > 150


@pytest.fixture
def sharded(directory):
    CausalLM(CONFIG).save_pretrained(directory, max_shard_bytes=8000)
    return directory


def edit_index(directory, function):
    file = directory / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    function(index["weight_map"])
    file.write_text(json.dumps(index))


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "..",
        ".hidden.safetensors",
        "model.bin",
        "",
        "a\x00.safetensors",
    ],
)
def test_index_names_cannot_leave_the_directory(sharded, name):
    edit_index(sharded, lambda weight_map: weight_map.update({"lm_head.weight": name}))
    assert_refused(sharded, "must name plain *.safetensors files, got ")


def test_links_cannot_leave_the_directory(sharded, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    file = next(sharded.glob("model-00001*"))
    os.replace(file, elsewhere / file.name)
    file.symlink_to(elsewhere / file.name)
    assert_refused(sharded, f"{file.name} must lie in its directory, got a link to ")
    edit_index(sharded, lambda weight_map: weight_map.clear())
    (sharded / "config.json").unlink()
    (sharded / "config.json").symlink_to("/etc/hostname")
    assert_refused(sharded, "config.json must lie in its directory, got a link to ")


def test_hugging_face_cache(directory, tmp_path_factory):
    """A snapshot in the cache of huggingface_hub consists of links into the blobs beside it."""
    repository = tmp_path_factory.mktemp("models--a--b")
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, file in enumerate(directory.iterdir()):
        os.replace(file, repository / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert torch.equal(CausalLM.from_pretrained(snapshot).head_weight, CausalLM(CONFIG).head_weight)


@pytest.mark.parametrize(
    ("function", "message", "error"),
    [
        (lambda m: m.update({"x": "model-00009-of-00009.safetensors"}), "must contain model-00009", FileNotFoundError),
        (lambda m: m.pop("lm_head.weight"), "must list 'lm_head.weight' in one file", ValueError),
        (lambda m: m.update({"x": 3}), "must map tensor names to file names in weight_map", ValueError),
        (lambda m: m.clear(), "num_hidden_layers must fit the 0 stored tensors, got 2", ValueError),
    ],
    ids=["absent-shard", "unlisted-tensor", "not-a-name", "nothing"],
)
def test_wrong_index(sharded, function, message, error):
    edit_index(sharded, function)
    assert_refused(sharded, message, error)

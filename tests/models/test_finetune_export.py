"""`arfast export`: what it writes, that transformers reads it, and that nothing is overwritten or half written."""

import json
import os

import pytest
import torch

from arfast.adapter import adapter_parameters
from arfast.cli.main import main
from arfast.data import Tokenizer
from arfast.export import export
from arfast.finetune import load_pretrained
from arfast.hub import from_pretrained
from arfast.models import CausalLM
from arfast.nn.lora import LoraConfig, apply_lora, merge_lora


def same(a, b):
    return all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["to be or not to be"], vocab_size=101 + 158)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_round_trip(case, dtype, input_ids, tmp_path):
    """Every family: bit-equal in the same dtype, sharded, and transformers computes the same."""
    from transformers import AutoModelForCausalLM

    result = export(case.path, tmp_path / "out", dtype=dtype, max_shard_bytes=100_000)
    assert result.architecture == type(case.reference).__name__
    assert "model.safetensors.index.json" in result.files and "generation_config.json" in result.files
    assert max(size for name, size in result.files.items() if name.endswith(".safetensors")) < 120_000
    assert same(from_pretrained(tmp_path / "out"), from_pretrained(case.path, dtype=dtype))
    options = dict(dtype=torch.float32, attn_implementation="eager")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", **options).eval()
    expected = CausalLM.from_pretrained(case.path, dtype=dtype).float()
    for name, parameter in expected.named_parameters():
        assert torch.equal(parameter, dict(theirs.named_parameters())[name]), name
    with torch.no_grad():
        assert (theirs(input_ids).logits - expected(input_ids).logits).abs().max() < 1e-4
    again = export(tmp_path / "out", tmp_path / "again", max_shard_bytes=100_000)
    assert again == result
    for name in result.files:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name


@pytest.mark.parametrize("case", ["llama", "qwen3-moe"], indirect=True)
class TestAdapters:
    def test_merged(self, case, input_ids, tmp_path):
        peft = pytest.importorskip("peft")
        from arfast.adapter import load_base

        model = apply_lora(load_base(case.path), rank=2)
        for _, parameter in adapter_parameters(model):
            parameter.data.normal_(0, 0.2)
        model.save_pretrained(tmp_path / "adapter")
        with pytest.raises(ValueError, match="export: merge must be given for adapters, got False"):
            export(tmp_path / "adapter", tmp_path / "out")
        export(tmp_path / "adapter", tmp_path / "out", merge=True)
        assert same(from_pretrained(tmp_path / "out"), merge_lora(model))
        from transformers import AutoModelForCausalLM

        theirs = AutoModelForCausalLM.from_pretrained(case.path, dtype=torch.float32, attn_implementation="eager")
        theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").merge_and_unload().eval()
        with torch.no_grad():
            difference = theirs(input_ids).logits - from_pretrained(tmp_path / "out")(input_ids).logits
        assert difference.abs().max() < 1e-4

    def test_base_elsewhere(self, case, tmp_path):
        (tmp_path / "base").mkdir()
        for file in case.path.iterdir():
            (tmp_path / "base" / file.name).write_bytes(file.read_bytes())
        from arfast.adapter import load_base

        apply_lora(load_base(tmp_path / "base"), rank=2).save_pretrained(tmp_path / "adapter")
        (tmp_path / "base").rename(tmp_path / "moved")
        with pytest.raises(FileNotFoundError, match="load_model: base must be the directory of the adapters' model"):
            export(tmp_path / "adapter", tmp_path / "out", merge=True)
        assert not (tmp_path / "out").exists()
        export(tmp_path / "adapter", tmp_path / "out", merge=True, base=tmp_path / "moved")
        assert same(from_pretrained(tmp_path / "out"), from_pretrained(case.path))  # B is zero


@pytest.mark.parametrize("case", ["qwen2-tied"], indirect=True)
class TestFiles:
    @pytest.fixture
    def source(self, case, tokenizer, tmp_path):
        model = CausalLM.from_pretrained(case.path)
        config = model.config.replace(vocab_size=tokenizer.vocab_size, eos_token_id=tokenizer.eos_token_id)
        CausalLM(config).save_pretrained(tmp_path / "source")
        tokenizer.save(tmp_path / "source")
        return tmp_path / "source"

    def test_tokenizer_and_generation_config(self, source, tokenizer, tmp_path, capsys):
        assert main(["export", str(source), str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
        printed = capsys.readouterr().out.splitlines()
        assert json.loads(printed[-1])["architecture"] == "Qwen2ForCausalLM" and "parameters" in printed[-2]
        from transformers import AutoTokenizer, GenerationConfig

        text = "to be, or not to be"
        assert AutoTokenizer.from_pretrained(tmp_path / "out")(text)["input_ids"] == tokenizer.encode(text)
        assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == tokenizer.eos_token_id
        modes = {file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()}
        assert len(modes) == 1, modes

    def test_without_a_tokenizer(self, source, tmp_path, capsys):
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (source / name).unlink()
        assert main(["export", str(source), str(tmp_path / "out")]) == 0
        assert "without a tokenizer" in capsys.readouterr().out
        assert not (tmp_path / "out" / "tokenizer.json").exists()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["SOURCE", "SOURCE"], "export: directory must be absent or empty"),
            (["nowhere", "out"], "export: checkpoint must be an existing directory, got 'nowhere'"),
            (["SOURCE", "out", "--merge"], "export: merge must be left out for a whole model, got True"),
            (["SOURCE", "out", "--base", "x"], "export: base must be left out without merge, got 'x'"),
            (["SOURCE", "out", "--max-shard-size", "5 apples"], "max_shard_size must be a positive number of bytes"),
            (["SOURCE", "out", "--max-shard-size", "0"], "max_shard_size must be a positive number of bytes"),
        ],
    )
    def test_wrong_arguments(self, source, arguments, message, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        before = {file: file.read_bytes() for file in source.iterdir()}
        assert main(["export", *[str(source) if word == "SOURCE" else word for word in arguments]]) == 2
        assert message in capsys.readouterr().err
        assert {file: file.read_bytes() for file in source.iterdir()} == before
        assert [path.name for path in tmp_path.iterdir()] == ["source"]

    def test_a_file_or_a_full_directory_stays(self, source, tmp_path):
        (tmp_path / "file").write_text("mine")
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "note").write_text("mine")
        for name in ("file", "full"):
            with pytest.raises(ValueError, match="export: directory must be absent or empty"):
                export(source, tmp_path / name)
        assert (tmp_path / "file").read_text() == (tmp_path / "full" / "note").read_text() == "mine"
        (tmp_path / "empty").mkdir()
        export(source, tmp_path / "empty")

    def test_what_fails_leaves_nothing(self, source, tmp_path, monkeypatch):
        def fail(*_):
            raise OSError(28, "No space left on device")

        for name in ("arfast.hub.os.fsync", "arfast.export.check_copy"):
            with monkeypatch.context() as patch:
                patch.setattr(name, fail)
                with pytest.raises(OSError, match="No space left"):
                    export(source, tmp_path / "out")
            assert [path.name for path in tmp_path.iterdir()] == ["source"]

    def test_a_wrong_copy_is_noticed(self, source, tmp_path, monkeypatch):
        """As a disk that returns other bits would."""

        def other_bits(path, **options):
            model = from_pretrained(path, **options)
            model.head_weight.data.view(torch.int32)[0, 0] ^= 1
            return model

        monkeypatch.setattr("arfast.export.from_pretrained", other_bits)
        with pytest.raises(ValueError, match="must read back bit by bit, got another model.embed_tokens.weight"):
            export(source, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_damaged_step(self, source, tmp_path):
        from arfast.train.checkpoint import save_checkpoint

        def write(path):
            for file in source.iterdir():
                os.link(file, path / file.name)

        step = save_checkpoint(tmp_path, 3, write)
        export(step, tmp_path / "out")
        content = bytearray((step / "model.safetensors").read_bytes())
        content[-1] ^= 1
        (step / "model.safetensors").unlink()
        (step / "model.safetensors").write_bytes(content)
        with pytest.raises(RuntimeError, match="model.safetensors must have SHA-256"):
            export(step, tmp_path / "again")
        assert not (tmp_path / "again").exists()

    def test_our_own_family_is_refused(self, case, tmp_path):
        config = CausalLM.from_pretrained(case.path).config
        config = config.replace(num_experts=4, num_shared_experts=1, moe_intermediate_size=16)
        CausalLM(config).save_pretrained(tmp_path / "own")
        with pytest.raises(ValueError, match="export: checkpoint must have a configuration that transformers knows"):
            export(tmp_path / "own", tmp_path / "out")

    def test_tokenizer_that_does_not_fit(self, source, tmp_path):
        Tokenizer.train(["a b c " * 9, "de fg" * 9], vocab_size=263).save(source)
        with pytest.raises(ValueError, match="tokenizer must have at most the"):
            export(source, tmp_path / "out")
        with pytest.raises(ValueError, match="tokenizer must have at most the"):
            load_pretrained(source, lora=LoraConfig())

"""The doctor finds a sound installation sound, and finds every fault that it is there for."""

import inspect
import json
import shutil
import subprocess
import sys

import pytest
import torch

import arfast.ops as ops
from arfast.cli.main import main
from arfast.data import Document, Tokenizer, prepare_dataset
from arfast.doctor import examine
from arfast.doctor.data import data_checks
from arfast.doctor.finding import run_checks
from arfast.doctor.kernels import op_checks
from arfast.doctor.machine import machine_checks
from arfast.doctor.model import model_checks
from arfast.doctor.sequence_lengths import (
    _measure_apart,
    eager_attention,
    measure_sequence_lengths,
    table,
)
from arfast.models import CausalLM, CausalLMConfig
from arfast.nn import Attention, apply_lora


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Tensors here are too small to share."""


@pytest.fixture(autouse=True)
def _no_peaks(monkeypatch):
    """They take as long as all else together."""
    monkeypatch.setattr("arfast.peaks._BLOCK_SECONDS", 1e-4)
    monkeypatch.setattr("arfast.peaks._BLOCKS", 1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("doctor") / "data"
    texts = [f"document {i} of a corpus about the number {i * i} " * (3 + i % 7) for i in range(60)]
    prepare_dataset([Document(text, "") for text in texts], path, vocab_size=300)
    return path


@pytest.fixture(scope="module")
def model(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("doctor") / "model"
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    config = CausalLMConfig.preset("tiny-moe", vocab_size=300, num_key_value_heads=2, **sizes)
    CausalLM(config).save_pretrained(path)
    Tokenizer.load(data).save(path)
    return path


def failed(checks):
    """Names and figures of the checks that fail, of a kind: all of them take a second."""
    return {finding.name: finding.detail for finding in run_checks(checks) if not finding.passed}


def test_all_is_well(model, data):
    for arguments, count in ((("cpu",), 0), (("cpu", str(model), str(data)), 4)):
        findings = list(examine(*arguments))
        assert [finding for finding in findings if not finding.passed] == []
        assert len(findings) == 46 + count


def test_every_op_is_examined():
    public = {
        name for name in ops.__all__ if inspect.isfunction(getattr(ops, name)) and not name.endswith("_reference")
    }
    examined = {name.partition(",")[0] for name, _ in op_checks("cpu")}
    # What runs inside of another check, or is two ops that are examined.
    assert public - examined == {"beam_hypotheses", "router_losses", "decode_beams", "decode_samples"}


@pytest.mark.parametrize("name", ["attention", "rms_norm", "moe_experts", "kv_append", "decode_step"])
def test_wrong_op(name, monkeypatch):
    right = getattr(ops, name)

    def wrong(*arguments, **options):
        out = right(*arguments, **options)
        first = out[0] if isinstance(out, tuple) else out
        first = first * 1.01
        return (first, *out[1:]) if isinstance(out, tuple) else first

    monkeypatch.setattr(ops, name, wrong)
    assert {f"{name}, float32"} <= failed(op_checks("cpu")).keys()


@pytest.mark.parametrize("name", ["sample", "moe_route", "beam_prune", "speculative_verify"])
def test_op_that_raises(name, monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("no such\ninstruction")

    monkeypatch.setattr(ops, name, broken)
    assert failed(op_checks("cpu"))[name] == "RuntimeError: no such instruction"


def test_leak_from_the_future(monkeypatch):
    right = ops.attention
    monkeypatch.setattr(ops, "attention", lambda *t, **options: right(*t, **options | dict(causal=False)))
    found = failed(model_checks("cpu"))["no leak from the future"]
    assert found.startswith("23 of 23 earlier positions changed")


def test_leak_between_documents(monkeypatch, model, data):
    right = Attention.forward

    def leaky(self, hidden, layout):
        layout.cu_seqlens = None
        layout.shape = (1, *layout.shape[-1:])
        return right(self, hidden, layout)

    monkeypatch.setattr(Attention, "forward", leaky)
    assert failed(model_checks("cpu"))["no leak between packed documents"].startswith("37 of 37 positions changed")
    found = failed(model_checks("cpu", str(model), str(data)))["no leak between packed documents"]
    assert found.startswith("32 of 32 positions changed")


def test_mean_of_means(monkeypatch):
    right = CausalLM.forward
    monkeypatch.setattr(CausalLM, "forward", lambda *t, num_items=None, **options: right(*t, **options))
    assert "accumulation does not change gradients" in failed(model_checks("cpu"))


def test_lossy_checkpoint(monkeypatch):
    from arfast.doctor import model as checks

    right = CausalLM.from_pretrained

    def lossy(*arguments, **options):
        model = right(*arguments, **options)
        model.model.norm.weight.data[0] += 1e-7
        return model

    monkeypatch.setattr(checks.CausalLM, "from_pretrained", lossy)
    found = failed(model_checks("cpu"))
    assert found["model comes back from the disk as it was"].startswith("1 parameters differ")
    assert found["training goes on from a checkpoint"].endswith("parameters differ after the next step")


def test_damaged_data(data, model, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    shard = next(path for path in (tmp_path / "data").glob("train-*.bin"))
    content = bytearray(shard.read_bytes())
    content[-9] ^= 1
    shard.write_bytes(content)
    found = failed(data_checks(None, str(tmp_path / "data")))
    assert "must have the content that its header names" in found["shards have the hashes of their manifest"]
    tokenizer = tmp_path / "data" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    assert "tokenizer is the one of the shards" in failed(data_checks(None, str(tmp_path / "data")))


def test_other_tokenizer_and_small_vocabulary(data, model, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    config = CausalLM.from_pretrained(model).config.replace(vocab_size=280, num_experts=0)
    CausalLM(config).save_pretrained(tmp_path / "model")
    Tokenizer.train(["another text"], 260).save(tmp_path / "model")
    found = failed(data_checks(str(tmp_path / "model"), str(data)))
    assert {"data and model have the same tokenizer", "token ids are below the model's vocabulary"} <= found.keys()


def test_adapters_are_examined_merged(model, tmp_path):
    from arfast.adapter import load_base

    apply_lora(load_base(model), rank=2).save_pretrained(tmp_path)
    assert failed(model_checks("cpu", str(tmp_path))) == {}


def test_peak_that_a_run_assumed(model, tmp_path):
    """A run that divided by a tenth of what the machine reaches reported ten times its utilisation."""
    shutil.copytree(model, tmp_path / "model")
    for peak, expected in ((1e6, True), (1e18, False)):
        state = {"config": {"dtype": "float32", "peak_flops": peak}}
        (tmp_path / "model" / "trainer_state.json").write_text(json.dumps(state))
        assert ("matrix product, float32" in failed(machine_checks("cpu", str(tmp_path / "model")))) == expected


class TestCommandLine:
    def test_one_line_each_and_status(self, model, data, capsys, monkeypatch):
        assert main(["doctor", "--device", "cpu", "--model", str(model), "--data", str(data)]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert all(line.startswith("ok  ") for line in lines[:-1])
        assert json.loads(lines[-1])["failed"] == [] and len(json.loads(lines[-1])["checks"]) == len(lines) - 1
        right = ops.swiglu
        monkeypatch.setattr(ops, "swiglu", lambda *t: right(*t) + 1)
        assert main(["doctor", "--device", "cpu"]) == 1
        lines = capsys.readouterr().out.splitlines()
        assert sum(line.startswith("FAILED  swiglu") for line in lines) == 2
        assert json.loads(lines[-1])["failed"] == ["swiglu, float32", "swiglu, bfloat16"]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--device", "tpu"], "doctor: device must be cpu, or cuda where there is one, got 'tpu'"),
            (["--model", "nowhere"], "doctor: model must be an existing directory, got 'nowhere'"),
            (["--data", "nowhere"], "doctor: data must be an existing directory, got 'nowhere'"),
            (["--sequence-lengths", "0"], "doctor: sequence_lengths must be in [1, 1048576], got 0"),
            (["--sequence-lengths", "--data", "."], "model and data must be left out with sequence_lengths"),
        ],
    )
    def test_wrong_arguments(self, arguments, message, capsys):
        assert main(["doctor", *arguments]) == 2
        assert message in capsys.readouterr().err

    def test_table(self, monkeypatch, capsys):
        measured = {"seconds": 0.0125, "bytes": 3 << 20}
        monkeypatch.setattr("arfast.doctor.sequence_lengths._measure_apart", lambda case: measured)
        assert main(["doctor", "--device", "cpu", "--sequence-lengths", "64"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [cell.strip() for cell in lines[2].split("|")] == [
            "",
            "64",
            "12.5",
            "12.5",
            "1.0",
            "3.0",
            "3.0",
            "1.0",
            "",
        ]
        assert json.loads(lines[-1])["rows"] == [{"seqlen": 64, "eager": measured, "fused": measured}]


class TestSequenceLengths:
    def test_eager_is_attention(self):
        q, k = torch.randn(1, 33, 4, 16), torch.randn(1, 33, 2, 16)
        torch.testing.assert_close(eager_attention(q, k, k.flip(1)), ops.attention_reference(q, k, k.flip(1)))

    def test_memory_is_measured(self):
        """Scores and probabilities of 1024 x 1024 in float32 are there at once; the fused path has neither."""
        shape = dict(num_heads=8, num_kv_heads=2, head_dim=32, dtype="float32")
        (row,) = measure_sequence_lengths([1024], **shape)
        one = 8 * 1024 * 1024 * 4
        assert 2 * one < row["eager"]["bytes"] < 12 * one
        assert row["fused"]["bytes"] < one
        assert row["eager"]["seconds"] > 0 and row["fused"]["seconds"] > 0
        assert "1024" in table([row]).splitlines()[2]

    def test_memory_of_the_past_does_not_count(self):
        """In a process of its own: in this one, earlier tests may have told the heap to keep what is freed."""
        large, kept = "torch.ones(64 << 20)", "torch.ones(8 << 20)"
        lines = ["import torch", "from arfast.doctor.sequence_lengths import ProcessMemory", f"large = {large}"]
        lines += ["del large", "memory = ProcessMemory()", f"kept = {kept}", "print(memory.peak() / kept.nbytes)"]
        done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
        assert 1 <= float(done.stdout) < 2

    def test_what_does_not_fit_is_a_row(self):
        case = dict(
            num_heads=16, num_kv_heads=1, head_dim=2, dtype="float32", device="cpu", path="eager", seqlen=1 << 16
        )
        assert _measure_apart(case) == {"error": "out of memory"}
        row = {"seqlen": 1 << 16, "eager": {"error": "out of memory"}, "fused": {"seconds": 1.0, "bytes": 1 << 20}}
        assert "out of memory" in table([row]) and "1,000.0" in table([row])

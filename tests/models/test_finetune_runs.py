"""Fine-tuning from directories that transformers wrote, by the command line and the trainer."""

import json
import random
import signal

import pytest
import torch
from safetensors import safe_open

from arfast.adapter import load_adapter, load_base, load_model
from arfast.cli.main import main
from arfast.data import Document, Tokenizer, prepare_dataset
from arfast.finetune import load_pretrained
from arfast.models import CausalLM
from arfast.nn.lora import LoraConfig, apply_lora, merge_lora
from arfast.train import TrainConfig, Trainer

VOCAB = 320
SIZES = dict(
    vocab_size=VOCAB + 5,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
FAMILIES = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", dict(sliding_window=None)),
    "qwen2": ("Qwen2", dict(tie_word_embeddings=True)),
    "qwen3": ("Qwen3", dict(head_dim=16)),
    "mixtral": ("Mixtral", dict(num_local_experts=4)),
    "qwen3-moe": ("Qwen3Moe", dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)),
}
OPTIONS = ["--max-steps", "3", "--seqlen", "32", "--batch-size", "4", "--no-progress", "--no-keep-freed-memory"]


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Tensors here are too small to share."""


def texts():
    rng = random.Random(0)
    words = "the a cat dog bird sees hears likes follows and then red green old new".split()
    return [" ".join(rng.choice(words) for _ in range(rng.randint(20, 120))) for _ in range(120)]


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.train(texts(), VOCAB)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts()))
    return path


def make_directory(path, tokenizer, family):
    """As transformers saves a model with its tokenizer, here one with a chat template."""
    transformers = pytest.importorskip("transformers")
    name, options = FAMILIES[family]
    torch.manual_seed(1)
    ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = getattr(transformers, f"{name}Config")(**SIZES, **options, **ids, initializer_range=0.1)
    getattr(transformers, f"{name}ForCausalLM")(config).save_pretrained(path)
    tokenizer.save(path / "plain")
    theirs = transformers.AutoTokenizer.from_pretrained(path / "plain")
    theirs.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    theirs.save_pretrained(path)
    for file in (path / "plain").iterdir():
        file.unlink()
    (path / "plain").rmdir()
    return path


@pytest.fixture(scope="session", params=FAMILIES)
def directory(request, tokenizer, tmp_path_factory):
    return make_directory(tmp_path_factory.mktemp(request.param), tokenizer, request.param)


@pytest.fixture(scope="session")
def llama(tokenizer, tmp_path_factory):
    return make_directory(tmp_path_factory.mktemp("llama"), tokenizer, "llama")


def train(capsys, *arguments):
    status = main(["train", *map(str, arguments), *OPTIONS])
    output = capsys.readouterr()
    return status, output.err, json.loads(output.out.splitlines()[-1]) if output.out else None


def theirs_of(path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.mark.parametrize(
    ("lora", "dtype"), [([], "float32"), (["--lora-rank", "2"], "bfloat16")], ids=["full-float32", "lora-bfloat16"]
)
def test_command_line(directory, corpus, tokenizer, lora, dtype, tmp_path, capsys):
    """A run from every family; transformers (with peft) loads what it leaves, and computes the same."""
    run = tmp_path / "run"
    arguments = ["--init-from", directory, "--data", corpus, "--output-dir", run, "--dtype", dtype, *lora]
    status, errors, summary = train(capsys, *arguments, "--learning-rate", "1e-2")
    assert status == 0, errors
    assert (" of them (" in errors) == bool(lora)
    assert (summary["trainable_parameters"] < summary["parameters"]) == bool(lora)
    assert Tokenizer.load(run).fingerprint == tokenizer.fingerprint
    from transformers import AutoTokenizer

    assert "content" in AutoTokenizer.from_pretrained(run).chat_template
    weights = run / ("adapter_model.safetensors" if lora else "model.safetensors")
    before = weights.read_bytes()
    assert train(capsys, *arguments, "--learning-rate", "1e-2")[2]["step"] == 3  # finished: nothing is left to do
    assert weights.read_bytes() == before
    ids = torch.randint(0, VOCAB, (2, 20))
    if lora:
        peft = pytest.importorskip("peft")
        theirs = peft.PeftModel.from_pretrained(theirs_of(directory), run).eval()
        assert not (run / "model.safetensors").exists()
    else:
        theirs = theirs_of(run)
        for file in (directory, run):
            assert json.loads((file / "config.json").read_text())["architectures"] == theirs.config.architectures
    ours = load_model(run, dtype=torch.float32)
    with torch.no_grad():
        assert (theirs(ids).logits - ours(ids).logits).abs().max() < 1e-4
        assert (ours(ids).logits - CausalLM.from_pretrained(directory)(ids).logits).abs().max() > 0.01


def test_generate_and_eval_take_adapters(llama, corpus, tmp_path, capsys):
    run = tmp_path / "run"
    train(capsys, "--init-from", llama, "--data", corpus, "--output-dir", run, "--lora-rank", "2")
    assert main(["generate", str(run), "--prompt", "the cat", "--max-new-tokens", "4", "--seed", "1"]) == 0
    assert main(["eval", str(run), "--data", str(run / "data"), "--seqlen", "32"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["loss"] > 0


def test_first_loss_is_the_base_model_s(llama, corpus, tokenizer, tmp_path, capsys):
    """The data are tokenized with the directory's tokenizer, and training starts from its weights."""
    run = tmp_path / "run"
    train(capsys, "--init-from", llama, "--data", corpus, "--output-dir", run, "--dtype", "float32")
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    trainer = Trainer(
        CausalLM.from_pretrained(llama),
        TrainConfig(output_dir=tmp_path / "other", max_steps=3, seqlen=32, batch_size=4),
        run / "data",
    )
    batch = next(trainer._next_batches())
    with torch.no_grad():
        expected = theirs_of(llama)(batch.input_ids, labels=batch.labels).loss
    # log_every of the command skips the first rows, the last step always has one
    assert first["step"] == 3 and abs(first["loss"] - expected) < 1.0
    assert trainer.step([batch]).loss == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lora-rank", "2"], "train: init_from must be given with lora_rank, got none"),
        (["--lora-alpha", "2"], "train: lora_rank must be given with lora_alpha, got none"),
        (["--init-from", "LLAMA", "--preset", "tiny"], "train: preset must be left out with init_from, got 'tiny'"),
        (["--init-from", "LLAMA", "--vocab-size", "9"], "train: vocab_size must be left out with init_from, got 9"),
        (["--init-from", "LLAMA", "--lora-rank", "0"], "apply_lora: rank must be in [1, 16384], got 0"),
        (
            ["--init-from", "LLAMA", "--lora-rank", "2", "--lora-targets", "x"],
            "targets must be some of q_proj, k_proj",
        ),
        (["--init-from", "nowhere"], "Tokenizer.load: path must hold a tokenizer.json, got 'nowhere'"),
    ],
)
def test_wrong_arguments(llama, corpus, arguments, message, tmp_path, capsys):
    arguments = [llama if word == "LLAMA" else word for word in arguments]
    status, errors, _ = train(capsys, *arguments, "--data", corpus, "--output-dir", tmp_path / "run")
    assert status == 2 and message in errors
    assert not (tmp_path / "run").exists()


def test_tokenizer_that_does_not_fit(llama, corpus, tmp_path, capsys):
    other = Tokenizer.train(texts() + [chr(200 + i) * 9 for i in range(99)], 400)
    for file in llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    other.save(tmp_path)
    arguments = ["--data", corpus, "--output-dir", tmp_path / "run"]
    status, errors, _ = train(capsys, "--init-from", tmp_path, *arguments)
    assert status == 2 and f"tokenizer must have at most the {VOCAB + 5} tokens of the model" in errors
    # nor data that another tokenizer made
    prepare_dataset([Document(text, "") for text in texts()], tmp_path / "data", other)
    arguments = ["--data", tmp_path / "data", "--output-dir", tmp_path / "run"]
    status, errors, _ = train(capsys, "--init-from", llama, *arguments)
    assert status == 2 and "vocab_size of at least" in errors
    third = Tokenizer.train(texts(), 300)
    prepare_dataset([Document(text, "") for text in texts()], tmp_path / "third", third)
    arguments = ["--data", tmp_path / "third", "--output-dir", tmp_path / "run"]
    status, errors, _ = train(capsys, "--init-from", llama, *arguments)
    assert status == 2 and "tokenizer must be the one of the train split" in errors
    assert not (tmp_path / "run").exists()


def test_code_is_not_passed_on(llama, tmp_path):
    for file in llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"auto_map": {"AutoTokenizer": "evil.py"}}))
    _, tokenizer = load_pretrained(tmp_path)
    tokenizer.save(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "tokenizer_config.json").read_text()) == config
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match="PretrainedTokenizer: generation_config.json must be JSON"):
        load_pretrained(tmp_path)


class TestTrainer:
    """The trainer with adapters: what it optimizes, what it saves, and how it goes on."""

    @pytest.fixture(scope="class")
    def data(self, tokenizer, tmp_path_factory):
        path = tmp_path_factory.mktemp("data") / "data"
        prepare_dataset([Document(text, "") for text in texts()], path, tokenizer)
        return path

    def trainer(self, llama, data, path, dtype="float32", **settings):
        lora = LoraConfig(rank=2, dropout=settings.pop("dropout", 0.1))
        model, tokenizer = load_pretrained(llama, lora=lora, dtype=getattr(torch, dtype))
        options = dict(max_steps=6, seqlen=32, batch_size=4, save_every=2, learning_rate=1e-2, progress=False)
        options |= dict(keep_freed_memory=False, dtype=dtype, keep_last=0) | settings
        return Trainer(model, TrainConfig(output_dir=path, **options), data, tokenizer)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_only_adapters_change(self, llama, data, tmp_path, dtype):
        trainer = self.trainer(llama, data, tmp_path / "run", dtype)
        model, working = trainer.model, trainer.engine.compute_model
        adapters = {name for name, p in model.named_parameters() if p.requires_grad}
        optimized = {id(p) for group in trainer.engine.optimizer.param_groups for p in group["params"]}
        assert optimized == {id(p) for p in model.parameters() if p.requires_grad}
        before = {name: p.clone() for name, p in model.named_parameters()}
        if dtype == "bfloat16":  # the frozen weights are in memory once
            shared = {name for name, p in model.named_parameters() if p is working.get_parameter(name)}
            assert shared == before.keys() - adapters
        trainer.fit()
        assert {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} == adapters
        assert len(adapters) == 2 * 7 * 2
        assert not any(p.grad is not None for p in working.parameters() if not p.requires_grad)

    def test_checkpoints_are_small(self, llama, data, tmp_path):
        trainer = self.trainer(llama, data, tmp_path / "run")
        trainer.fit()
        step = tmp_path / "run" / "step-00000006"
        with (
            safe_open(step / "adapter_model.safetensors", "pt") as adapter,
            safe_open(step / "optimizer.safetensors", "pt") as optimizer,
        ):
            assert len(adapter.keys()) == 28 and len(optimizer.keys()) == 3 * 28
        assert not list(step.glob("model*"))
        sizes = {path: sum(file.stat().st_size for file in path.glob("*.safetensors")) for path in (llama, step)}
        assert sizes[step] < sizes[llama]
        base = json.loads((step / "base.json").read_text())
        assert base["path"] == str(llama.resolve()) and base["fingerprint"].startswith("files:")

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_resume_is_bit_identical(self, llama, data, tmp_path, dtype):
        """With dropout, which draws from the random state that a checkpoint has."""
        self.trainer(llama, data, tmp_path / "whole", dtype).fit()
        for step in (2, 4):
            path = tmp_path / f"stopped-{step}"
            stopped = self.trainer(llama, data, path, dtype)
            record = stopped._save

            def save(record=record, stopped=stopped, step=step):
                result = record()
                if stopped.state.step == step:
                    signal.raise_signal(signal.SIGTERM)
                return result

            stopped._save = save
            with pytest.raises(SystemExit):
                stopped.fit()
            torch.manual_seed(99)
            self.trainer(llama, data, path, dtype).fit()
            whole, resumed = tmp_path / "whole", path
            assert [p.name for p in sorted(resumed.glob("step-*"))] == [p.name for p in sorted(whole.glob("step-*"))]
            for file in (whole / "step-00000006").iterdir():
                if file.suffix != ".json":
                    assert (resumed / "step-00000006" / file.name).read_bytes() == file.read_bytes(), file.name
            losses = [
                [json.loads(line).get("loss") for line in open(run / "metrics.jsonl")] for run in (whole, resumed)
            ]
            assert losses[0] == losses[1]

    def test_another_base_or_adapter_is_refused(self, llama, data, tmp_path):
        self.trainer(llama, data, tmp_path / "run", max_steps=2).fit()
        other = CausalLM.from_pretrained(llama)
        other.head_weight.data[0, 0] += 1
        for file in llama.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        other.save_pretrained(tmp_path)
        with pytest.raises(RuntimeError, match="Trainer: lora.base must be 'files:"):
            self.trainer(tmp_path, data, tmp_path / "run").fit()
        with pytest.raises(RuntimeError, match="Trainer: lora.dropout must be 0.1 to continue"):
            self.trainer(llama, data, tmp_path / "run", dropout=0.2).fit()

    def test_model_made_in_memory(self, llama, data, tmp_path):
        """It is known by its weights."""
        model = apply_lora(CausalLM.from_pretrained(llama), rank=2)
        options = dict(seqlen=32, batch_size=4, progress=False, keep_freed_memory=False)
        Trainer(model, TrainConfig(output_dir=tmp_path / "run", max_steps=2, **options), data).fit()
        assert json.loads((tmp_path / "run" / "base.json").read_text())["fingerprint"].startswith("tensors:")
        again = load_adapter(CausalLM.from_pretrained(llama), tmp_path / "run")
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters()))
        with pytest.raises(FileNotFoundError, match="load_model: base must be the directory of the adapters"):
            load_model(tmp_path / "run")

    def test_merged_for_use(self, llama, data, tmp_path):
        trainer = self.trainer(llama, data, tmp_path / "run")
        trainer.fit()
        merged = load_model(tmp_path / "run")
        assert merged.lora is None
        ids = torch.randint(0, VOCAB, (1, 20))
        trainer.model.eval()
        with torch.no_grad():
            assert (merged(ids).logits - trainer.model(ids).logits).abs().max() < 1e-4
        expected = merge_lora(load_adapter(load_base(llama), tmp_path / "run"))
        assert all(torch.equal(a, b) for a, b in zip(merged.parameters(), expected.parameters()))

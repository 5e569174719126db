"""EncoderDecoder in a Trainer, beside a CausalLM on the same pairs: both learn them, resume, and refuse what splits
documents."""

import itertools

import pytest
import torch
from tiny_models import TINY

from arfast.data import DatasetManifest, PackedDataset, Tokenizer, prepare_dataset
from arfast.data.parallel import SEPARATOR, Pair, pair_documents
from arfast.generate import generate
from arfast.models import CausalLM, EncoderDecoder, EncoderDecoderConfig
from arfast.train import TrainConfig, Trainer

SIZES = dict(
    hidden_size=32, intermediate_size=48, num_attention_heads=4, encoder_layers=2, decoder_layers=3,
    max_position_embeddings=64, initializer_range=0.05,
)  # fmt: skip
ENGLISH, GERMAN = "one two three four five six seven eight", "eins zwei drei vier fünf sechs sieben acht"
WORDS = dict(zip(ENGLISH.split(), GERMAN.split(), strict=True))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Numbers in German, the last word first."""
    rows = [list(row) for n in (1, 2, 3) for row in itertools.permutations(WORDS, n)][::5]
    pairs = [Pair(" ".join(row), " ".join(WORDS[word] for word in reversed(row))) for row in rows]
    path = tmp_path_factory.mktemp("numbers") / "data"
    prepare_dataset(pair_documents(pairs, "numbers"), path, tokenizer_kind="word", vocab_size=60)
    return path


def trainer(data, path, kind, **changes):
    tokenizer = Tokenizer.load(data)
    (separator,) = tokenizer.encode(SEPARATOR, add_special_tokens=False)
    special = dict(vocab_size=tokenizer.vocab_size, eos_token_id=tokenizer.eos_token_id)
    special["pad_token_id"] = tokenizer.pad_token_id
    if kind == "encoder-decoder":
        config = EncoderDecoderConfig(separator_token_id=separator, **SIZES, **special)
        model = EncoderDecoder(config)
    else:
        model = CausalLM(TINY.replace(tie_word_embeddings=True, initializer_range=0.05, **special))
    settings = dict(max_steps=120, seqlen=32, batch_size=8, packing="documents", learning_rate=0.01, weight_decay=0.0)
    settings |= dict(save_every=0, progress=False, output_dir=str(path)) | changes
    return Trainer(model, TrainConfig(**settings), data), tokenizer


@pytest.mark.parametrize("kind", ["encoder-decoder", "decoder-only"])
def test_training_learns_to_translate(data, tmp_path, kind):
    run, tokenizer = trainer(data, tmp_path, kind)
    assert run.fit().loss < 0.1
    texts = [tokenizer.decode(document) for shard in DatasetManifest.load(data).open_split("train")
             for document in shard.documents()]  # fmt: skip
    for text in texts[::20]:
        source, target = text.split(SEPARATOR)
        prompt = torch.tensor([tokenizer.encode(source + SEPARATOR)])
        for beams in (1, 3):
            found = generate(run.model, prompt, 8, num_beams=beams)[0, prompt.shape[1] :]
            assert tokenizer.decode(found) == target


def test_both_models_see_the_same_targets(data, tmp_path):
    batch = PackedDataset(data, "train", 32, "documents").batch(0, 8)
    counts = {}
    for kind in ("encoder-decoder", "decoder-only"):
        run, _ = trainer(data, tmp_path / kind, kind)
        counts[kind] = int(run.model(batch.input_ids, batch.labels, batch.cu_seqlens).num_tokens)
    assert set(counts.values()) == {batch.num_tokens}


def test_training_resumes_to_the_last_bit(data, tmp_path):
    options = dict(max_steps=6, save_every=2, dtype="bfloat16")
    whole, _ = trainer(data, tmp_path / "whole", "encoder-decoder", **options)
    whole.fit()
    first, _ = trainer(data, tmp_path / "parts", "encoder-decoder", **options)
    work = first._work_between_steps

    def stop(*arguments):
        work(*arguments)
        if first.state.step == 3:
            raise KeyboardInterrupt

    first._work_between_steps = stop
    with pytest.raises(KeyboardInterrupt):
        first.fit()
    resumed, _ = trainer(data, tmp_path / "parts", "encoder-decoder", **options)
    assert resumed.fit().step == 6
    assert all(map(torch.equal, whole.model.parameters(), resumed.model.parameters()))


def test_what_a_trainer_refuses(data, tmp_path):
    with pytest.raises(ValueError, match="packing must be documents or padded for EncoderDecoder, got 'contiguous'"):
        trainer(data, tmp_path, "encoder-decoder", packing="contiguous")
    trainer(data, tmp_path, "decoder-only", packing="contiguous")
    with pytest.raises(ValueError, match="cuda_graph must be False for EncoderDecoder"):
        trainer(data, tmp_path, "encoder-decoder", cuda_graph=True)

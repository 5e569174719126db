"""`arfast lab images`: nothing of what is held out is trained on, only codes are drawn, captions decide, its errors."""

import math

import numpy as np
import pytest
import torch

from arfast.data import DatasetManifest, PackedDataset, Tokenizer, prepare_dataset
from arfast.lab import images as study
from arfast.lab.image_text import (
    HELD_OUT_WORDINGS,
    WORDINGS,
    WORDS,
    bits_per_image,
    caption,
    caption_tokenizer,
    captioned_images,
    code_tokens,
    draw_codes,
)
from arfast.lab.pictures import Judge, Pictures, load_digits, load_photographs
from arfast.models import CausalLM, CausalLMConfig, ImageTokenizer

STUDY = "images"

pytest.importorskip("sklearn")
pytestmark = pytest.mark.usefixtures("one_thread")

TINY = ["--codes", 16, "--photo-codes", 8, "--max-tokens", 4096, "--samples", 2]


def tiny_model(tokenizer, **settings):
    sizes = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2
    )
    special = {
        name: getattr(tokenizer, name) for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
    }
    return CausalLM(CausalLMConfig.preset("tiny", **sizes, **special, **settings))


def test_pictures_are_split():
    digits, photos = load_digits(), load_photographs()
    assert digits.known.shape == (1438, 1, 8, 8) and digits.held_out.shape == (359, 1, 8, 8)
    assert photos.known.shape == (1664, 3, 16, 16) and photos.held_out.shape == (416, 3, 16, 16)
    for pictures in (digits, photos):
        rows = [{image.numpy().tobytes() for image in part} for part in (pictures.known, pictures.held_out)]
        assert rows[0].isdisjoint(rows[1])
        assert pictures.known.min() == 0 and pictures.known.max() == 1
    parts = Pictures.split(torch.arange(11), torch.arange(11) + 100)
    assert parts.held_out.tolist() == [4, 9] and parts.held_out_labels.tolist() == [104, 109]
    assert parts.known.tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 10] and parts.known_labels.tolist()[4] == 105


def test_patches_are_whole_pieces_of_the_photographs():
    from sklearn.datasets import load_sample_images

    photos = load_photographs()
    second = load_sample_images().images[1][16:32, 48:64].astype(np.float32) / 255
    number = 26 * 40 + 40 + 3  # 26 rows of 40 patches in the first photograph
    assert number % 5 == 3
    assert np.array_equal(photos.known[number - number // 5].permute(1, 2, 0).numpy(), second)


def test_documents():
    """Each image with each wording trained on; the targets are its codes and the end. No held-out wording is there."""
    tokenizer, codes = caption_tokenizer(5), torch.tensor([[[0, 4], [3, 1]], [[2, 2], [2, 2]]])
    documents = list(captioned_images(codes, torch.tensor([7, 0])))
    assert len(documents) == 2 * len(WORDINGS)
    texts = [document.text for document in documents]
    captions = {text.split("\ue000")[0] for text in texts}
    assert captions == {caption(wording, digit) for wording in WORDINGS for digit in (7, 0)}
    assert captions.isdisjoint(caption(wording, digit) for wording in HELD_OUT_WORDINGS for digit in range(10))
    tokens = code_tokens(tokenizer, 5)
    assert len(tokens.unique()) == 5 and tokenizer.unk_token_id not in tokens
    for document in documents:
        [(start, end)] = document.targets
        assert end == len(document.text)
        image = codes[int(document.source == "image 1")].flatten()
        assert tokenizer.encode(document.text[start:end], add_special_tokens=False) == tokens[image].tolist()
    known, unseen = (tokenizer.encode(caption(wording, 7)) for wording in HELD_OUT_WORDINGS)
    assert tokenizer.unk_token_id not in known and tokenizer.unk_token_id in unseen
    assert len(tokenizer.encode(caption(WORDINGS[0], 3), add_special_tokens=False)) == 1  # a class is one token


def test_labels_are_codes_and_the_end(tmp_path):
    tokenizer, codes = caption_tokenizer(5), torch.tensor([[[0, 4], [3, 1]]] * 2)
    documents = captioned_images(codes, torch.tensor([7, 8]))
    prepare_dataset(documents, tmp_path / "data", tokenizer, validation_fraction=0.0, test_fraction=0.0)
    data = PackedDataset(tmp_path / "data", "train", 16, "padded")
    assert data.num_samples == 2 * len(WORDINGS)
    expected = [*code_tokens(tokenizer, 5)[codes[0].flatten()].tolist(), tokenizer.eos_token_id]
    for labels in data.batch(0, data.num_samples).labels.tolist():
        assert [label for label in labels if label != -100] == expected


def test_only_codes_are_drawn():
    tokenizer = caption_tokenizer(5)
    model = tiny_model(tokenizer, initializer_range=1.0).eval()
    captions = ["7", "a photo of the digit nine", "unheard of"]
    codes = draw_codes(model, tokenizer, captions, 40, 5, 6, temperature=1.0, top_k=0, seed=1)
    assert codes.shape == (3, 40, 6) and codes.dtype == torch.int64
    assert codes.min() == 0 and codes.max() == 4
    same = draw_codes(model, tokenizer, captions, 40, 5, 6, temperature=1.0, top_k=0, seed=1)
    other = draw_codes(model, tokenizer, captions, 40, 5, 6, temperature=1.0, top_k=0, seed=2)
    assert torch.equal(codes, same) and not torch.equal(codes, other)
    # a caption draws with its own seed, whatever stands beside it and however far that is padded
    alone = draw_codes(model, tokenizer, captions[:1], 40, 5, 6, temperature=1.0, top_k=0, seed=1)
    assert torch.equal(alone[0], codes[0])


def test_drawn_codes_are_those_that_the_model_finds_likely():
    """Nearly without chance: the best code after the caption, then the best after that."""
    tokenizer = caption_tokenizer(5)
    model = tiny_model(tokenizer, initializer_range=0.5, tie_word_embeddings=False).eval()
    tokens = code_tokens(tokenizer, 5)
    captions = ["7", "a photo of the digit nine"]
    drawn = draw_codes(model, tokenizer, captions, 1, 5, 6, temperature=1e-6, top_k=0, seed=1)[:, 0]
    for text, codes in zip(captions, drawn.tolist(), strict=True):
        ids, best = tokenizer.encode(text + "\ue000"), []
        for _ in range(6):
            best.append(int(model(torch.tensor([ids])).logits[0, -1, tokens].argmax()))
            ids.append(int(tokens[best[-1]]))
        assert codes == best and len(set(best)) > 1


def test_bits_per_image():
    tokenizer, codes, labels = caption_tokenizer(5), torch.tensor([[[0, 4]], [[3, 1]]]), torch.tensor([7, 0])
    model = tiny_model(tokenizer, initializer_range=0.5).eval().double()
    nats = []
    for image, digit in zip(codes, ("7", "0"), strict=True):
        prompt = tokenizer.encode(f"a drawing of the digit {digit}\ue000")
        tokens = code_tokens(tokenizer, 5)[image.flatten()].tolist()
        logits = model(torch.tensor([prompt + tokens])).logits[0].log_softmax(-1)
        nats += [-logits[len(prompt) - 1 + i, token].item() for i, token in enumerate(tokens)]
    assert bits_per_image(model, tokenizer, codes, labels) == pytest.approx(math.fsum(nats) / 2 / math.log(2))


def test_judge():
    known = torch.zeros(40, 1, 2, 2)
    known[20:] = 1
    known += 0.01 * torch.rand(known.shape, generator=torch.Generator().manual_seed(0))
    judge = Judge(known, torch.arange(40) // 20, torch.arange(40).view(40, 1, 1) % 7)
    assert judge.recognised(known, torch.arange(40) // 20) == 1
    assert judge.recognised(known, torch.zeros(40)) == 0.5
    assert judge.nearest(known[:3]) == 0
    assert judge.nearest(known.amax(0, keepdim=True) + 3) == pytest.approx(6, abs=0.02)
    assert judge.copied(torch.tensor([0, 6, 7, 3]).view(4, 1, 1)) == 0.75


def test_canvas():
    rows = [torch.zeros(3, 1, 2, 2), torch.arange(12.0).view(3, 1, 2, 2)]
    expected = [[0, 0, 0.5] * 3, [0, 0, 0.5] * 3, [0.5] * 9]
    expected += [[0, 1, 0.5, 4, 5, 0.5, 8, 9, 0.5], [2, 3, 0.5, 6, 7, 0.5, 10, 11, 0.5], [0.5] * 9]
    assert study.canvas(rows)[..., 0].tolist() == expected


def test_different():
    assert study.different(torch.tensor([[[1, 2]], [[2, 1]], [[1, 2]], [[1, 2]]])) == 0.5


def test_distances_table():
    rows = {"real": dict(nearest=2.0, copied=0.0, different=1.0), "made": dict(nearest=3.0, copied=0.25, different=0.5)}
    assert [line.split() for line in study.describe_distances(rows)[1:]] == [
        ["real", "2.000", "1.00", "0.0%", "100.0%"],
        ["made", "3.000", "1.50", "25.0%", "50.0%"],
    ]


def test_psnr():
    assert study.psnr(torch.full((2, 3), 0.6), torch.full((2, 3), 0.5)) == pytest.approx(20, abs=1e-4)


def test_study(tmp_path, lab, monkeypatch):
    monkeypatch.setattr(study, "_STEPS", 20)
    digits = load_digits()
    monkeypatch.setattr(study, "load_digits", lambda: Pictures.split(digits.known[:150], digits.known_labels[:150]))
    arguments = ["--output-dir", tmp_path, *TINY]
    text, found = lab(*arguments)
    assert [one["temperature"] for one in found["samples"]] == [1.0, 0.6]
    assert [one["codes"] for one in found["photos"]] == [8] and found["digits"]["bits_per_pixel"] == 1
    for one in found["samples"]:
        assert list(one["recognised"]) == [*WORDINGS, *HELD_OUT_WORDINGS]
        assert all(0 <= share <= 1 for share in one["recognised"].values()) and one["nearest"] > 0
    assert found["real"]["recognised"] > 0.5 and found["digits"]["psnr"] > 5
    assert 0 < found["bits_per_image"]["held_out"] < 200
    assert f"recognised {found['real']['recognised']:.1%}" in text and "please show me a {word} (held out)" in text
    if found["figure"]:
        assert (tmp_path / "images.png").read_bytes().startswith(b"\x89PNG")
    check_training_data(tmp_path / "digits-16")
    metrics = tmp_path / "digits-16" / "model" / "metrics.jsonl"
    before = metrics.read_bytes()
    assert lab(*arguments) == (text, found)
    assert metrics.read_bytes() == before


def check_training_data(folder):
    """The run's data: the known images alone, with the wordings that are trained on alone."""
    tokenizer = Tokenizer.load(folder / "data")
    known = load_digits()
    known = Pictures.split(known.known[:150], known.known_labels[:150])
    codes = ImageTokenizer.from_pretrained(folder / "images").encode(known.known)
    expected = {document.text for document in captioned_images(codes, known.known_labels)}
    shards = DatasetManifest.load(folder / "data").open_split("train")
    texts = [tokenizer.decode(document.tolist()) for shard in shards for document in shard.documents()]
    assert len(known.known) == 120 and set(texts) == expected
    captions = {text.split("\ue000")[0] for text in texts}
    assert captions == {caption(wording, digit) for wording in WORDINGS for digit in range(len(WORDS))}


def test_another_tokenizer_in_its_place(tmp_path, lab, monkeypatch):
    monkeypatch.setattr(study, "_STEPS", 1)
    (tmp_path / "digits-16").mkdir()
    config = study.ImageTokenizerConfig(image_size=8, num_codes=4)
    ImageTokenizer(config).save_pretrained(tmp_path / "digits-16" / "images")
    message = lab("--output-dir", tmp_path, *TINY, status=2)
    assert "digits-16/images' must hold an ImageTokenizerConfig(" in message and "num_codes=4" in message


@pytest.mark.parametrize(
    "options, message",
    [
        (["--max-tokens", 0], "lab images: max_tokens must be at least 1, got 0"),
        (["--samples", 0], "lab images: samples must be at least 1, got 0"),
        (["--temperature", 0], "lab images: temperature must be a positive number, got 0.0"),
        (["--temperature", "nan"], "lab images: temperature must be a positive number, got nan"),
        (["--codes", 1], "ImageTokenizerConfig: num_codes must be an integer in [2, 65536], got 1"),
        (["--photo-codes", 8, 1], "ImageTokenizerConfig: num_codes must be an integer in [2, 65536], got 1"),
    ],
)
def test_errors(tmp_path, lab, options, message):
    path = tmp_path / "out"
    assert message in lab("--output-dir", path, *options, status=2)
    assert not path.exists()


def test_without_scikit_learn(tmp_path, lab, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    message = lab("--output-dir", tmp_path / "out", status=2)
    assert "lab images needs scikit-learn and pillow: pip install 'arfast[lab]'" in message

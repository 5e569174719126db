"""`arfast lab translation`: both models learn, on the same pairs, with as many parameters; scores are sacreBLEU's."""

import itertools

import pytest

from arfast.data.parallel import django_pairs
from arfast.lab import translation
from arfast.lab.translation import corpus_scores, describe, encoder_decoder_config, matched_decoder
from arfast.models import CausalLM, EncoderDecoder

STUDY = "translation"

sacrebleu = pytest.importorskip("sacrebleu")
WORDS = dict(red="rotes", green="grünes", big="großes", small="kleines", old="altes", new="neues")
THINGS = dict(house="Haus", car="Auto", book="Buch", picture="Bild", boat="Boot", dress="Kleid")
TINY = ["--max-tokens", 64 * 2 * 220, "--vocab-size", 300, "--hidden-size", 32, "--layers", 1]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Files of 216 sentences, of which each word has its own translation."""
    rows = list(itertools.product(WORDS, WORDS, THINGS))
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "en").write_text("".join(f"a {a} {b} {c}\n" for a, b, c in rows))
    (folder / "de").write_text("".join(f"ein {WORDS[a]} {WORDS[b]} {THINGS[c]}\n" for a, b, c in rows))
    return [str(folder / "en"), str(folder / "de")]


@pytest.mark.usefixtures("one_thread")
def test_study(corpus, tmp_path, lab, monkeypatch):
    monkeypatch.setattr(translation, "_SEQLEN", 64)
    monkeypatch.setattr(translation, "_LEARNING_RATE", 0.01)
    arguments = ["--files", *corpus, "--output-dir", tmp_path, *TINY]
    text, found = lab(*arguments)
    models = found["models"]
    assert list(models) == ["encoder-decoder", "decoder-only"] and found["pairs"] == 216
    sizes = [one["parameters"] for one in models.values()]
    assert abs(sizes[0] - sizes[1]) < 0.02 * sizes[0]
    for one in models.values():
        assert one["beams"]["BLEU"] > 20 and one["beams"]["chrF"] > 45 > found["untranslated"]["chrF"]
        assert f"{one['parameters']:,}" in text and f"{one['greedy']['chrF']:.1f}" in text
    if found["figure"]:
        assert (tmp_path / "translation.png").read_bytes().startswith(b"\x89PNG")
    before = (tmp_path / "encoder-decoder" / "metrics.jsonl").read_bytes()
    assert lab(*arguments) == (text, found)
    assert (tmp_path / "encoder-decoder" / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("hidden_size, layers", [(32, 1), (192, 3), (256, 6)])
def test_both_models_are_of_one_size(hidden_size, layers):
    options = translation.argparse.Namespace(hidden_size=hidden_size, layers=layers)
    config = encoder_decoder_config(options, vocab_size=500, separator_token_id=3, eos_token_id=2)
    decoder = matched_decoder(config)
    sizes = [model(c, device="meta").num_parameters() for model, c in ((EncoderDecoder, config), (CausalLM, decoder))]
    assert abs(sizes[0] - sizes[1]) < 0.005 * sizes[0]
    assert decoder.eos_token_id == 2 and decoder.num_hidden_layers == 2 * layers


def test_scores_are_those_of_sacrebleu():
    texts, references = ["the cat sat on the mat", "a dog"], ["the cat sat on a mat", "a dog barks"]
    found = corpus_scores(texts, references)
    assert found["BLEU"] == sacrebleu.BLEU().corpus_score(texts, [references]).score
    assert found["chrF"] == sacrebleu.CHRF().corpus_score(texts, [references]).score
    assert corpus_scores(references, references) == {"BLEU": pytest.approx(100), "chrF": pytest.approx(100)}


def test_table():
    scores = dict(greedy=dict(BLEU=1.26, chrF=2.0), beams=dict(BLEU=3.0, chrF=4.0))
    one = dict(parameters=1234, seconds=9.87, loss=1.5, **scores)
    lines = describe({"decoder-only": one}, dict(BLEU=5.0, chrF=6.0), 7).splitlines()
    assert lines[0].count("7 beams") == 2
    assert lines[1].split() == ["decoder-only", "1,234", "9.9", "1.500", "1.3", "3.0", "2.0", "4.0"]
    assert lines[2] == "untranslated: BLEU 5.0, chrF 6.0"


@pytest.mark.parametrize(
    "options, message",
    [
        (["--max-tokens", 0], "lab translation: max_tokens must be at least 1, got 0"),
        (["--num-beams", 1], "lab translation: num_beams must be at least 2, got 1"),
        (["--sentences", 0], "lab translation: sentences must be at least 1, got 0"),
        (["--hidden-size", 97], "EncoderDecoderConfig: hidden_size must be a multiple of 6, got 97"),
        (["--layers", 0], "EncoderDecoderConfig: encoder_layers must be an integer in [1, 4096], got 0"),
        (["--files", "nowhere", "nowhere"], "read_pairs: path must be a file, got 'nowhere'"),
        (["--language", "xx"], "django_pairs: language must be one of"),
        (["--data", "nowhere"], "handbook_pairs: folder must have a folder en-US, got 'nowhere'"),
    ],
)
def test_errors(tmp_path, lab, options, message):
    pytest.importorskip("django")
    path = tmp_path / "out"
    assert message in lab("--output-dir", path, *options, status=2)
    assert not path.exists() or not list(path.iterdir())


def test_packages_that_are_missing(tmp_path, lab, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "scores need sacrebleu (pip install 'arfast[lab]')" in lab("--output-dir", tmp_path, status=2)
    with pytest.raises(ImportError, match="^django_pairs: Django must be installed .*, got none$"):
        django_pairs("de")


def test_too_few_pairs(tmp_path, lab):
    for name in ("en", "de"):
        (tmp_path / name).write_text("".join(f"{name} {i}\n" for i in range(20)))
    error = lab("--files", tmp_path / "en", tmp_path / "de", "--output-dir", tmp_path / "out", status=2)
    assert "lab translation: data must hold at least 50 usable pairs, got 20" in error

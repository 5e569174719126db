"""Translation by an encoder-decoder with cross-attention and by a decoder-only model over source and target: as many
parameters (the decoder-only model's feed-forward layers are wider), the same pairs in the same order, loss on the
translations alone, greedy decoding and beam search, BLEU and chrF of sacreBLEU on sentences that neither has seen.

Without --data: the messages of the installed Django, which pip brings, a few hundred short texts, too few to learn a
language from: the untranslated texts, with their names and placeholders, score more. The Debian package debian-handbook
has nine times as many: --data django /usr/share/doc/debian-handbook/html.

Examples:
  arfast lab translation --language fr
  arfast lab translation --files corpus.en corpus.de --max-tokens 5000000

Runs are kept in --output-dir: a study that was interrupted goes on, and one that is finished only translates again.
"""

import argparse
import importlib.util
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from arfast.data import DatasetManifest, Document, Tokenizer, prepare_dataset
from arfast.data.checks import check_at_least
from arfast.data.parallel import SEPARATOR, django_pairs, handbook_pairs, pair_documents, read_pairs
from arfast.generate import generate
from arfast.models import CausalLM, CausalLMConfig, EncoderDecoder, EncoderDecoderConfig

from .result import save_result
from .training import train, training_config

_SEQLEN, _BATCH_SIZE, _EVALUATIONS = 512, 2, 20
_PASSES, _MAX_TOKENS = 40, 1_500_000
_MAX_BYTES = _SEQLEN - 2  # of a pair, which then has as many tokens at most, and a start and an end token
_LEARNING_RATE, _LABEL_SMOOTHING = 3e-3, 0.1
_VALIDATION_SHARE = _TEST_SHARE = 0.08
_SENTENCES_AT_ONCE = 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    sources = "'django' or the folder of the handbook (default: django)"
    parser.add_argument("--data", nargs="+", default=["django"], metavar="SOURCE", help=sources)
    parser.add_argument("--files", nargs=2, metavar=("SOURCE", "TARGET"), help="line by line, instead of --data")
    parser.add_argument("--language", default="de", metavar="CODE", help="of --data, translated into (default: de)")
    passes = f"per model (default: {_PASSES} passes over the pairs, at most {_MAX_TOKENS})"
    parser.add_argument("--max-tokens", type=int, metavar="N", help=passes)
    parser.add_argument("--vocab-size", type=int, default=2048, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--hidden-size", type=int, default=128, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--layers", type=int, default=2, metavar="N", help="of each, encoder and decoder (default: 2)")
    parser.add_argument("--num-beams", type=int, default=4, metavar="K", help="(default: %(default)s)")
    parser.add_argument("--sentences", type=int, default=300, metavar="N", help="at most, to translate (default: 300)")


def run(arguments: argparse.Namespace) -> dict:
    check_at_least("lab translation", arguments, max_tokens=1, num_beams=2, sentences=1)
    if importlib.util.find_spec("sacrebleu") is None:
        raise ImportError("lab translation: scores need sacrebleu (pip install 'arfast[lab]')")
    encoder_decoder_config(arguments, vocab_size=1, separator_token_id=0)  # refuses bad sizes before anything is made
    directory, documents = Path(arguments.output_dir) / "data", read_corpus(arguments)
    shares = dict(validation_fraction=_VALIDATION_SHARE, test_fraction=_TEST_SHARE)
    prepare_dataset(documents, directory, vocab_size=arguments.vocab_size, **shares)
    tokenizer, pairs = Tokenizer.load(directory), read_test_pairs(directory, arguments.sentences)
    sources, references = ([tokenizer.decode(side) for side in sides] for sides in zip(*pairs, strict=True))
    print(f"{len(documents)} pairs; {len(pairs)} held-out sentences are translated", flush=True)
    found, translations = {}, {}
    for name, model in make_models(arguments, directory).items():
        found[name] = _train(model, name, directory, arguments)
        for decoding, beams in (("greedy", 1), ("beams", arguments.num_beams)):
            translations[name, decoding] = translate(model, tokenizer, [source for source, _ in pairs], beams)
            found[name][decoding] = corpus_scores(translations[name, decoding], references)
    untranslated = corpus_scores(sources, references)
    print(describe(found, untranslated, arguments.num_beams), flush=True)
    print(describe_examples(sources, references, {name: translations[name, "beams"] for name in found}), flush=True)
    figure = save_result(arguments, lambda figure: draw(figure, found, arguments.num_beams), (10, 4))
    shown = {name: {key: value for key, value in one.items() if key != "curve"} for name, one in found.items()}
    return {"pairs": len(documents), "models": shown, "untranslated": untranslated, "figure": figure}


def read_corpus(arguments: argparse.Namespace) -> list[Document]:
    """The pairs of all sources, no source text twice."""
    if arguments.files:
        pairs = read_pairs(*arguments.files)
    else:
        language, pairs = arguments.language, []
        for source in arguments.data:
            pairs += django_pairs(language) if source == "django" else handbook_pairs(source, language)
    documents = pair_documents(pairs, "files" if arguments.files else arguments.language, _MAX_BYTES)
    if len(documents) < 50:
        raise ValueError(f"lab translation: data must hold at least 50 usable pairs, got {len(documents)}")
    return documents


def read_test_pairs(directory: Path, count: int) -> list[tuple[list[int], list[int]]]:
    """Tokens of at most `count` held-out pairs from all over the test split: a source that ends with the separator, and
    its translation."""
    separator, pairs = separator_token(Tokenizer.load(directory)), []
    for shard in DatasetManifest.load(directory).open_split("test"):
        for tokens in shard.documents():
            cut = int(np.flatnonzero(tokens == separator)[0]) + 1
            pairs.append((tokens[:cut].tolist(), tokens[cut:-1].tolist()))
    places = np.linspace(0, len(pairs) - 1, min(count, len(pairs))).round().astype(int)
    return [pairs[place] for place in places]


def separator_token(tokenizer: Tokenizer) -> int:
    (token,) = tokenizer.encode(SEPARATOR, add_special_tokens=False)
    return token


def make_models(arguments: argparse.Namespace, directory: Path) -> dict[str, CausalLM]:
    """Both models, of about as many parameters."""
    vocabulary = DatasetManifest.load(directory).vocabulary
    separator = separator_token(Tokenizer.load(directory))
    config = encoder_decoder_config(arguments, separator_token_id=separator, **vocabulary)
    return {"encoder-decoder": EncoderDecoder(config), "decoder-only": CausalLM(matched_decoder(config))}


def encoder_decoder_config(arguments: argparse.Namespace, **vocabulary: int) -> EncoderDecoderConfig:
    d = arguments.hidden_size
    return EncoderDecoderConfig(
        hidden_size=d,
        intermediate_size=2 * d,
        encoder_layers=arguments.layers,
        decoder_layers=arguments.layers,
        num_attention_heads=max(1, d // 32),
        max_position_embeddings=2 * _SEQLEN,
        **vocabulary,
    )


def matched_decoder(config: EncoderDecoderConfig) -> CausalLMConfig:
    """A decoder-only model with as many layers as encoder and decoder together, and feed-forward layers so much wider
    that it has about as many parameters: they take the place of cross-attention."""
    shared = ("vocab_size hidden_size num_attention_heads num_key_value_heads max_position_embeddings rope_theta "
              "rms_norm_eps initializer_range bos_token_id eos_token_id pad_token_id").split()  # fmt: skip
    settings = {name: value for name, value in asdict(config).items() if name in shared}
    layers = config.encoder_layers + config.decoder_layers
    narrow = CausalLMConfig(
        intermediate_size=config.intermediate_size, num_hidden_layers=layers, tie_word_embeddings=True, **settings
    )
    missing = EncoderDecoder(config, device="meta").num_parameters() - narrow.num_parameters()
    wider = round(missing / (3 * config.hidden_size * layers))
    return narrow.replace(intermediate_size=config.intermediate_size + wider)


def _train(model: CausalLM, name: str, directory: Path, arguments: argparse.Namespace) -> dict:
    """Parameters, seconds of training, loss on the validation split, and its curve of (tokens, loss)."""
    num_tokens = DatasetManifest.load(directory).splits["train"].num_tokens
    max_tokens = arguments.max_tokens or min(_PASSES * num_tokens, _MAX_TOKENS)
    config = training_config(
        Path(arguments.output_dir) / name,
        max_tokens,
        _SEQLEN,
        _BATCH_SIZE,
        packing="documents",
        learning_rate=_LEARNING_RATE,
        label_smoothing=_LABEL_SMOOTHING,
        eval_every=max(1, max_tokens // (_SEQLEN * _BATCH_SIZE * _EVALUATIONS)),
    )
    result = train(model, config, directory)
    curve = [(row["tokens"], row["val_loss"]) for row in result.rows if "val_loss" in row]
    return {
        "parameters": model.num_parameters(),
        "seconds": result.seconds,
        "loss": result.evaluation.loss,
        "curve": curve,
    }


def translate(model: CausalLM, tokenizer: Tokenizer, sources: list[list[int]], num_beams: int) -> list[str]:
    """Translations of sources that end with the separator, those of about the same length at once."""
    texts = [""] * len(sources)
    order = sorted(range(len(sources)), key=lambda i: len(sources[i]))
    for first in range(0, len(order), _SENTENCES_AT_ONCE):
        some = order[first : first + _SENTENCES_AT_ONCE]
        width = max(len(sources[i]) for i in some)
        ids = torch.tensor([[0] * (width - len(sources[i])) + sources[i] for i in some])
        mask = torch.tensor([[0] * (width - len(sources[i])) + [1] * len(sources[i]) for i in some])
        longest = min(2 * width + 10, 2 * _SEQLEN - width)
        found = generate(model, ids, longest, num_beams=num_beams, attention_mask=mask)
        for i, tokens in zip(some, found[:, width:].tolist(), strict=True):
            texts[i] = tokenizer.decode(tokens)
    return texts


def corpus_scores(translations: list[str], references: list[str]) -> dict[str, float]:
    """BLEU (Papineni et al. 2002) and chrF (Popović 2015), both in [0, 100], as sacreBLEU computes them."""
    import sacrebleu

    metrics = {"BLEU": sacrebleu.corpus_bleu, "chrF": sacrebleu.corpus_chrf}
    return {name: metric(translations, [references]).score for name, metric in metrics.items()}


def describe(found: dict[str, dict], untranslated: dict[str, float], num_beams: int) -> str:
    """A table of both models, and what the untranslated sources would score."""
    columns = f"{'BLEU greedy':>12} {f'{num_beams} beams':>8} {'chrF greedy':>12} {f'{num_beams} beams':>8}"
    lines = [f"{'model':>16} {'parameters':>11} {'seconds':>8} {'nats/token':>11} {columns}"]
    for name, one in found.items():
        scores = [one[decoding][metric] for metric in ("BLEU", "chrF") for decoding in ("greedy", "beams")]
        shown = " ".join(f"{score:>{width}.1f}" for score, width in zip(scores, (12, 8, 12, 8), strict=True))
        lines.append(f"{name:>16} {one['parameters']:>11,} {one['seconds']:>8.1f} {one['loss']:>11.3f} {shown}")
    lines.append(f"untranslated: BLEU {untranslated['BLEU']:.1f}, chrF {untranslated['chrF']:.1f}")
    return "\n".join(lines)


def describe_examples(sources: list[str], references: list[str], translations: dict[str, list[str]]) -> str:
    """Sentences from all over the held-out ones, shortest first."""
    order = sorted(range(len(sources)), key=lambda i: len(sources[i]))
    lines = []
    for share in (0.3, 0.5, 0.7, 0.9):
        i = order[int(share * (len(order) - 1))]
        lines += [f"{sources[i].strip()}", f"{'reference':>16}: {references[i]}"]
        lines += [f"{name:>16}: {texts[i]}" for name, texts in translations.items()]
    return "\n".join(lines)


def draw(figure, found: dict[str, dict], num_beams: int) -> None:
    left, right = figure.subplots(1, 2)
    for name, one in found.items():
        left.plot(*zip(*one["curve"]), label=f"{name}, {one['parameters']:,} parameters")
    left.ticklabel_format(axis="x", style="sci", scilimits=(0, 0))
    left.set_xlabel("tokens of training, sources included")
    left.set_ylabel("validation loss (nats per token of a translation)")
    left.legend(fontsize="small")
    kinds = [(metric, decoding) for metric in ("BLEU", "chrF") for decoding in ("greedy", "beams")]
    places = np.arange(len(kinds))
    for number, (name, one) in enumerate(found.items()):
        right.bar(places + 0.4 * number - 0.2, [one[decoding][metric] for metric, decoding in kinds], 0.4, label=name)
    names = {"greedy": "greedy", "beams": f"{num_beams} beams"}
    right.set_xticks(places, [f"{metric}\n{names[decoding]}" for metric, decoding in kinds])
    right.set_ylabel("score on held-out sentences")

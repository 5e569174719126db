"""Continue a prompt with a trained model; the text is shown as it is made.

CHECKPOINT is a run directory of `arfast train`, one of its steps, or another model directory in Hugging Face layout.

Examples:
  arfast generate runs/default --prompt "def main(" --max-new-tokens 100 --seed 1
  arfast generate runs/default --prompt "import " --num-beams 4
  arfast generate runs/default --prompt "for name in names:" --temperature 0 --prompt-lookup 8
"""

import argparse
import sys
import time

from arfast.cli.common import add_checkpoint_arguments, load_checkpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint_arguments(parser)
    parser.add_argument("--prompt", default="", help="text to continue (default: a new document)")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="(default: 128)")
    parser.add_argument("--num-beams", type=int, default=1, help="more than 1: beam search (default: 1)")
    parser.add_argument("--temperature", type=float, help="0: always the likeliest (default: 0.8, with beams 0)")
    parser.add_argument("--top-k", type=int, help="0: off (default: 50)")
    parser.add_argument("--top-p", type=float, help="(default: 1.0)")
    parser.add_argument("--min-p", type=float, help="(default: 0.0)")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="1: off (default: 1.0)")
    parser.add_argument("--min-new-tokens", type=int, default=0, help="no end before (default: 0)")
    parser.add_argument("--length-penalty", type=float, default=1.0, help="of beam search (default: 1.0)")
    parser.add_argument("--num-beam-groups", type=int, default=1, help="groups of beams that differ (default: 1)")
    parser.add_argument("--diversity-penalty", type=float, default=0.0, help="between them (default: 0.0)")
    parser.add_argument("--draft", metavar="CHECKPOINT", help="a smaller model that drafts what this one verifies")
    parser.add_argument("--num-draft-tokens", type=int, help="at a time (default: as many as pay)")
    parser.add_argument("--prompt-lookup", type=int, metavar="N", help="draft up to N tokens from the text so far")
    parser.add_argument("--seed", type=int, help="of the sampling (default: another one each time)")


def run(arguments: argparse.Namespace) -> dict:
    import torch

    from arfast.generate import DraftStatistics

    model, tokenizer = load_checkpoint(arguments.checkpoint, arguments.dtype)
    ids = tokenizer.encode(arguments.prompt)
    if not ids:
        raise ValueError("generate: prompt must not be empty for a tokenizer without a start token, got ''")
    options = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    names = ("repetition_penalty", "min_new_tokens", "num_beams", "length_penalty", "num_beam_groups")
    names += ("diversity_penalty", "num_draft_tokens", "top_k", "top_p", "min_p", "seed")
    options |= {name: value for name in names if (value := getattr(arguments, name)) is not None}
    temperature = arguments.temperature
    if temperature is None:
        temperature = 0.8 if arguments.num_beams == 1 else 0.0
    if temperature != 0:
        options |= dict(do_sample=True, temperature=temperature)
    statistics = DraftStatistics()
    if arguments.draft is not None:
        draft_model, draft_tokenizer = load_checkpoint(arguments.draft, arguments.dtype)
        if draft_tokenizer.fingerprint != tokenizer.fingerprint:
            raise ValueError(
                f"generate: draft must have the tokenizer of {arguments.checkpoint}, got {arguments.draft}"
            )
        options["draft_model"] = draft_model
    options |= dict(prompt_lookup_num_tokens=arguments.prompt_lookup, draft_statistics=statistics)
    printer = _Printer(tokenizer, arguments.prompt)
    started = time.perf_counter()
    tokens = model.generate(
        torch.tensor([ids], device=model.head_weight.device),
        max_new_tokens=arguments.max_new_tokens,
        streamer=printer if arguments.num_beams == 1 else None,
        **options,
    )
    seconds = time.perf_counter() - started
    new = tokens[0, len(ids) :].tolist()
    if arguments.num_beams != 1:
        printer.put(tokens[:, : len(ids)])
        printer.put(tokens[0, len(ids) :])
        printer.end()
    speed = len(new) / seconds
    result = dict(text=tokenizer.decode(new), tokens=len(new), tokens_per_second=round(speed, 1))
    summary = f"{len(new)} tokens, {speed:.1f} tokens per second"
    if statistics.rounds > 0:
        result |= dict(drafted=statistics.drafted, accepted=statistics.accepted)
        summary += f", {statistics.accepted} of {statistics.drafted} drafted tokens accepted"
    print(summary, file=sys.stderr)
    return result


class _Printer:
    """Prints text as tokens arrive (the streamer interface of transformers); the first call brings the prompt.

    A token may end in the middle of a character: the decoded text is shown up to the last complete one.
    """

    def __init__(self, tokenizer, prompt):
        self.tokenizer, self.prompt = tokenizer, prompt
        self.ids, self.shown, self.started = [], 0, False

    def put(self, value):
        if not self.started:
            self.started = True
            print(self.prompt, end="", flush=True)
            return
        self.ids += value.reshape(-1).tolist()
        text = self.tokenizer.decode(self.ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._show(text)

    def end(self):
        self._show(self.tokenizer.decode(self.ids) + "\n")

    def _show(self, text):
        print(text[self.shown :], end="", flush=True)
        self.shown = len(text)

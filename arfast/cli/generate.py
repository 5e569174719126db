"""Continue a prompt with a trained model; the text is shown as it is made.

CHECKPOINT is a run directory of `arfast train`, one of its steps, or another model directory in Hugging Face layout.

Examples:
  arfast generate runs/default --prompt "def main(" --max-new-tokens 100 --seed 1
  arfast generate runs/default --prompt "import " --num-beams 4
"""

import argparse
import sys
import time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="model directory")
    parser.add_argument("--prompt", default="", help="text to continue (default: a new document)")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="(default: 128)")
    parser.add_argument("--num-beams", type=int, default=1, help="more than 1: beam search (default: 1)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token (default: 0.8)")
    parser.add_argument("--top-k", type=int, default=50, help="0: off (default: 50)")
    parser.add_argument("--top-p", type=float, default=1.0, help="(default: 1.0)")
    parser.add_argument("--min-p", type=float, default=0.0, help="(default: 0.0)")
    parser.add_argument("--length-penalty", type=float, default=1.0, help="of beam search (default: 1.0)")
    parser.add_argument("--seed", type=int, help="of the sampling (default: another one each time)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="(default: float32)")


def run(arguments: argparse.Namespace) -> dict:
    import torch

    from arfast.data import Tokenizer
    from arfast.models import CausalLM

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = Tokenizer.load(arguments.checkpoint)
    model = CausalLM.from_pretrained(arguments.checkpoint, dtype=getattr(torch, arguments.dtype), device=device)
    ids = tokenizer.encode(arguments.prompt)
    if not ids:
        raise ValueError("generate: prompt must not be empty for a tokenizer without a start token, got ''")
    sampled = arguments.num_beams == 1 and arguments.temperature > 0
    options = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    if sampled:
        names = ("temperature", "top_k", "top_p", "min_p")
        options |= dict(do_sample=True, seed=arguments.seed, **{name: getattr(arguments, name) for name in names})
    if arguments.num_beams != 1:
        options |= dict(num_beams=arguments.num_beams, length_penalty=arguments.length_penalty)
    printer = _Printer(tokenizer, arguments.prompt)
    started = time.perf_counter()
    tokens = model.generate(
        torch.tensor([ids], device=device),
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
    print(f"{len(new)} tokens, {speed:.1f} tokens per second", file=sys.stderr)
    return dict(text=tokenizer.decode(new), tokens=len(new), tokens_per_second=round(speed, 1))


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

"""Check this installation, and with --model and --data what is trained on it, by doing what training relies on: ops
against references, causal and document leaks, gradient accumulation, a checkpoint's round trip, hashes of shards and
tokenizer, the machine's peaks. One line per check; exit status 1 when one fails.

--sequence-lengths measures time and memory of attention instead, with the scores materialised and fused.

Examples:
  arfast doctor
  arfast doctor --model runs/default --data runs/default/data
  arfast doctor --sequence-lengths 512 1024 2048 4096
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--model", metavar="DIR", help="model directory, run or adapters (default: a small random one)")
    parser.add_argument("--data", metavar="DIR", help="data set made by `arfast tokenize`")
    parser.add_argument("--sequence-lengths", type=int, nargs="*", metavar="T", help="(default: 512 ... 16384)")


def run(arguments: argparse.Namespace) -> dict:
    from pathlib import Path

    import torch

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"doctor: device must be cpu, or cuda where there is one, got {device!r}")
    for name in ("model", "data"):
        if (path := getattr(arguments, name)) is not None and not Path(path).is_dir():
            raise FileNotFoundError(f"doctor: {name} must be an existing directory, got {path!r}")
    if arguments.sequence_lengths is not None:
        return _measure(arguments, device)
    return _examine(arguments, device)


def _examine(arguments, device):
    from arfast.doctor import examine

    findings = []
    for finding in examine(device, arguments.model, arguments.data):
        findings.append(finding)
        print(f"{'ok    ' if finding.passed else 'FAILED'}  {finding.name:<42} {finding.detail}", flush=True)
    failed = [finding.name for finding in findings if not finding.passed]
    details = {finding.name: finding.detail for finding in findings}
    return dict(device=device, failed=failed, checks=details, exit_status=1 if failed else 0)


def _measure(arguments, device):
    from arfast.doctor import measure_sequence_lengths, table
    from arfast.doctor.sequence_lengths import DEFAULT_LENGTHS

    if arguments.model is not None or arguments.data is not None:
        raise ValueError("doctor: model and data must be left out with sequence_lengths, got one")
    rows = list(measure_sequence_lengths(arguments.sequence_lengths or DEFAULT_LENGTHS, device=device))
    print(table(rows))
    return dict(device=device, rows=rows)

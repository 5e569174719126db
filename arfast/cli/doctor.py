"""Check this installation by doing what training relies on: ops against their references, causal and document leaks,
gradient accumulation, a checkpoint's round trip. Takes seconds; exit status 1 when a check fails.

Example:
  arfast doctor
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")


def run(arguments: argparse.Namespace) -> dict:
    import torch

    from arfast.doctor import examine

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    failed = []
    for finding in examine(device):
        print(f"{'ok  ' if finding.passed else 'FAIL'}  {finding.name:<42} {finding.detail}", flush=True)
        if not finding.passed:
            failed.append(finding.name)
    return dict(device=device, failed=failed, exit_status=1 if failed else 0)

"""Versions, what the library was built for, devices and threads: the first thing to send with a question.

Example:
  arfast info
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(arguments: argparse.Namespace) -> dict:
    from arfast.doctor import environment

    facts = environment()
    for name, value in facts.items():
        print(f"{name:>18}: {', '.join(map(str, value)) if isinstance(value, list) else value}")
    return facts

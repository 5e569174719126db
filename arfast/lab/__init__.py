"""Studies: what autoregressive models do, each shown by one command on real data, with a figure.

A study is a module with `add_arguments(parser)` and `run(arguments) -> dict`, which `arfast lab NAME` calls.
"""

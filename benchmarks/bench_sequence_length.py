"""Time and peak memory of attention, forward and backward, by sequence length: with the scores materialised, and fused.

Every figure is measured in a process of its own, see `arfast.doctor.measure_sequence_lengths`; `arfast doctor
--sequence-lengths` prints the same table. --save-table writes benchmarks/results/sequence-length-<device>.md.
"""

import report

from arfast.doctor import measure_sequence_lengths, table
from arfast.doctor.sequence_lengths import DEFAULT_LENGTHS

SHAPE = dict(num_heads=8, num_kv_heads=2, head_dim=64, dtype="bfloat16")


def bench_sequence_length(device, benchmark, request):
    option = request.config.option
    lengths = DEFAULT_LENGTHS[:1] if option.benchmark_disable else DEFAULT_LENGTHS
    rows = benchmark.pedantic(lambda: list(measure_sequence_lengths(lengths, device=device, **SHAPE)), rounds=1)
    print(f"\n{table(rows)}")
    assert "error" not in rows[0]["fused"]
    if option.save_table:
        report.save_page(f"sequence-length-{device}", "Attention by sequence length", describe(device), table(rows))


def describe(device: str) -> str:
    heads = "q [1, T, {num_heads}, {head_dim}], k and v [1, T, {num_kv_heads}, {head_dim}]"
    shape = (heads + ", {dtype}, causal").format(**SHAPE)
    return f"{shape}; forward and backward on the {device}; memory above the inputs."

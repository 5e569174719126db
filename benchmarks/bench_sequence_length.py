"""Time and peak memory of attention, forward and backward, by sequence length: with the scores materialised, and fused.

Every figure is measured in a process of its own, see `arfast.doctor.measure_sequence_lengths`; `arfast doctor
--sequence-lengths` prints the same table. --save-table writes benchmarks/results/sequence-length-<device>.md.
"""

from pathlib import Path

import report

from arfast.doctor import measure_sequence_lengths, table
from arfast.doctor.sequence_lengths import DEFAULT_LENGTHS

SHAPE = dict(num_heads=8, num_kv_heads=2, head_dim=64, dtype="bfloat16")
RESULTS = Path(__file__).resolve().parent / "results"


def bench_sequence_length(device, benchmark, request):
    option = request.config.option
    lengths = DEFAULT_LENGTHS[:1] if option.benchmark_disable else DEFAULT_LENGTHS
    rows = benchmark.pedantic(lambda: list(measure_sequence_lengths(lengths, device=device, **SHAPE)), rounds=1)
    text = f"{describe(device)}\n\n{table(rows)}\n"
    print(f"\n{text}")
    assert "error" not in rows[0]["fused"]
    if option.save_table:
        (RESULTS / f"sequence-length-{device}.md").write_text(f"# Attention by sequence length\n\n{text}")


def describe(device: str) -> str:
    heads = "q [1, T, {num_heads}, {head_dim}], k and v [1, T, {num_kv_heads}, {head_dim}]"
    shape = (heads + ", {dtype}, causal").format(**SHAPE)
    machine = "\n".join(f"* {key}: {value}" for key, value in report.machine().items())
    return f"{shape}; forward and backward on the {device}; memory above the inputs.\n\n{machine}"

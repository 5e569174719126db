"""What the pipeline did, for people: which stage let fall how many documents and bytes, why, and examples."""

REPORT_NAME, TABLE_NAME = "report.json", "report.txt"
_WIDTH = 44


def _row(name: str, documents: int, num_bytes: int, whole: int) -> str:
    share = f"{100 * num_bytes / whole:6.2f} %" if whole else ""
    return f"{name:<{_WIDTH}} {documents:>12,} {num_bytes:>16,} {share:>9}"


def make_table(report: dict) -> str:
    """The report as plain text; shares are of the bytes that were read."""
    stages = report["stages"]
    whole = stages["reading"]["bytes_in"]
    lines = [f"{'':<{_WIDTH}} {'documents':>12} {'bytes':>16} {'of bytes':>9}"]
    for name, stage in stages.items():
        lines.append(_row(name, stage["documents_out"], stage["bytes_out"], whole))
        dropped = sorted(stage["dropped"].items(), key=lambda item: (-item[1]["bytes"], item[0]))
        lines += [_row(f"  dropped: {reason}", e["documents"], e["bytes"], whole) for reason, e in dropped]
        gone = sum(entry["bytes"] for entry in stage["dropped"].values())
        if changed := stage["bytes_in"] - gone - stage["bytes_out"]:
            lines.append(_row("  taken out of documents that stay", stage["documents_out"], changed, whole))
        if stage["counts"]:
            counts = sorted(stage["counts"].items(), key=lambda item: (-item[1], item[0]))
            lines.append(f"  {', '.join(f'{key} {number:,}' for key, number in counts)}")
    lines.append("")
    for source in report["sources"]:
        for split, totals in source["splits"].items():
            counts = f"{totals['documents']:>12,} {totals['bytes']:>16,} {totals['tokens']:>14,} tokens"
            lines.append(f"{source['name'] + ' ' + split:<{_WIDTH}} {counts}")
    lines += ["", *(f"note: {note}" for note in report["notes"])]
    lines += ["examples of what was dropped", ""]
    for name, stage in stages.items():
        for reason, entry in stage["dropped"].items():
            for example in entry["examples"]:
                lines.append(f"{name}, {reason}: {example['source']}: {example['detail']}")
                lines.append(f"    {example['excerpt']}")
    return "\n".join(lines) + "\n"

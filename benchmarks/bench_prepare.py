"""Throughput and memory of `arfast prepare`, for corpora of several sizes; a script of its own, not part of the table:

    python benchmarks/bench_prepare.py --megabytes 100 1000 --workers 2 --handbook /usr/share/doc/debian-handbook/html

The corpus is real text that was cut and put together anew: a document is 8 stretches of 8 lines that follow each other
in the source files of Python's standard library, or of the Debian handbook in all its languages, drawn at random, so
that documents differ while lines and words are real. One in 20 is a copy of one before, one in 20 a copy with a word
changed. Memory is the proportional set size of the process and its workers, summed and sampled: a page that they share
counts once. The first table times each stage alone, in one process.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from arfast.data import builtin
from arfast.data.pipeline.clean import Cleaner
from arfast.data.pipeline.decontaminate import Decontaminator
from arfast.data.pipeline.extract import extract_text
from arfast.data.pipeline.language import detect_language
from arfast.data.pipeline.minhash import Signer
from arfast.data.pipeline.normalize import normalize
from arfast.data.pipeline.privacy import mask_personal_data
from arfast.data.pipeline.quality import check_code, check_fineweb, check_gopher, clean_c4
from arfast.data.pipeline.recipe import MASKS, Recipe
from arfast.data.pipeline.record import Dropped, Record, Tally
from arfast.data.pipeline.repetition import check_repetition
from arfast.data.pipeline.safety import WordList
from arfast.data.split import document_digest

STRETCHES = STRETCH_LINES = 8
FILE_BYTES = 50_000_000
SAMPLE_SECONDS = 0.5


def handbook_pages(folder):
    return [path.read_text() for path in sorted(Path(folder).rglob("*.html"))] if folder else []


def make_documents(lines, megabytes, generator):
    """Texts of real lines, about one in ten of them a copy or nearly one."""
    made, recent = 0, []
    while made < megabytes * 1e6:
        choice = generator.random()
        if recent and choice < 0.05:
            text = generator.choice(recent)
        elif recent and choice < 0.1:
            words = generator.choice(recent).split(" ")
            words[generator.randrange(len(words))] = "changed"
            text = " ".join(words)
        else:
            starts = [generator.randrange(len(lines) - STRETCH_LINES) for _ in range(STRETCHES)]
            text = "\n".join(line for start in starts for line in lines[start : start + STRETCH_LINES])
        recent = [*recent[-99:], text]
        made += len(text.encode())
        yield text


def write_corpus(folder, texts):
    """JSON-lines files of about FILE_BYTES."""
    folder.mkdir(parents=True)
    file, written = None, 0
    for text in texts:
        if file is None or written > FILE_BYTES:
            if file:
                file.close()
            file, written = open(folder / f"{len(list(folder.iterdir())):04d}.jsonl", "w"), 0
        written += file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    file.close()


def family_memory(root):
    """Proportional set size in bytes of a process and those that it started."""
    total, pending = 0, [root]
    while pending:
        process = pending.pop()
        try:
            rollup = Path(f"/proc/{process}/smaps_rollup").read_text()
            pending += map(int, Path(f"/proc/{process}/task/{process}/children").read_text().split())
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        total += sum(1024 * int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
    return total


def run_prepare(recipe, out_dir, workers):
    """(the command's last line, peak bytes of memory, seconds)."""
    path = out_dir.with_suffix(".json")
    path.write_text(json.dumps(recipe))
    command = [sys.executable, "-m", "arfast", "prepare", "--config", str(path), "--output-dir", str(out_dir)]
    start, peak = time.perf_counter(), 0
    with open(out_dir.with_suffix(".log"), "w") as log, open(out_dir.with_suffix(".out"), "w") as output:
        # Elsewhere: in a clone, `python -m` would find the source folder, which has no compiled library.
        process = subprocess.Popen([*command, "--workers", str(workers)], stdout=output, stderr=log, cwd=out_dir.parent)
        while process.poll() is None:
            peak = max(peak, family_memory(process.pid))
            time.sleep(SAMPLE_SECONDS)
    if process.returncode:
        raise RuntimeError(out_dir.with_suffix(".log").read_text()[-2000:])
    return json.loads(out_dir.with_suffix(".out").read_text().splitlines()[-1]), peak, time.perf_counter() - start


def time_stages(pages, seconds):
    """MB/s of each stage that sees one document, alone on one core."""
    code = [document.text for document in builtin("python")[:200]]
    prose = [normalize(extract_text(page)) for page in pages[:400]] or code
    cleaner, quality = (
        Cleaner(Recipe.from_json({"sources": [{"name": "a", "path": "a"}]})),
        Recipe.from_json({"sources": [{"name": "a", "path": "a"}]}).quality,
    )
    words, evaluation, signer = WordList(["never seen", "unseen"]), Decontaminator(prose[:20]), Signer(128, 5)
    stages = {
        "extract HTML": (extract_text, pages),
        "normalize": (normalize, prose),
        "detect language": (detect_language, prose),
        "Gopher": (lambda text: check_gopher(text, "en", quality.gopher), prose),
        "repetition": (lambda text: check_repetition(text, quality.repetition), prose),
        "C4": (lambda text: clean_c4(text, quality.c4), prose),
        "FineWeb": (lambda text: check_fineweb(text, quality.fineweb), prose),
        "code quality": (lambda text: check_code(text, quality.code), code),
        "word list": (words.check, prose),
        "personal data": (lambda text: mask_personal_data(text, MASKS), prose),
        "decontamination": (evaluation.find, prose),
        "digest": (document_digest, prose),
        "MinHash": (signer, prose),
        "all, of code": (lambda text: cleaner.clean(Record(text, "a.py", "code", ""), Tally()), code),
    }
    for name, (function, texts) in stages.items():
        done, start = 0, time.process_time()
        for text in texts:
            if time.process_time() - start > seconds:
                break
            try:
                function(text)
            except Dropped:
                pass
            done += len(text.encode())
        if done:
            print(f"{name:<20} {done / 1e6 / (time.process_time() - start):8.1f} MB/s", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, nargs="*", default=[100], help="sizes of the corpora")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--handbook", help="folder of debian-handbook's pages: half of the corpus is theirs")
    parser.add_argument("--folder", help="where to work (default: a temporary folder)")
    parser.add_argument("--seconds", type=float, default=1.0, help="at most, for a stage of the first table; 0: none")
    arguments = parser.parse_args()
    pages = handbook_pages(arguments.handbook)
    if arguments.handbook and not pages:
        parser.error(f"--handbook must be a folder with pages, got {arguments.handbook!r}")
    if arguments.seconds:
        time_stages(random.Random(0).sample(pages, len(pages)), arguments.seconds)
    lines = {"code": [line for document in builtin("python") for line in document.text.split("\n")]}
    if pages:
        lines["web"] = [line for page in pages for line in extract_text(page).split("\n") if line.strip()]
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for megabytes in arguments.megabytes:
            root = Path(folder, f"{megabytes:g}").resolve()
            sources = []
            for kind, name in (("code", "code"), ("prose", "web")):
                if name in lines:
                    texts = make_documents(lines[name], megabytes / len(lines), random.Random(name))
                    write_corpus(root / name, texts)
                    sources.append({"name": name, "path": str(root / name), "kind": kind})
            recipe = {"sources": sources, "language": {"identify": ["detect"]}}
            result, peak, seconds = run_prepare(recipe, root / "out", arguments.workers)
            report = json.loads((root / "out" / "report.json").read_text())
            counts = {name: stage["documents_out"] for name, stage in report["stages"].items()}
            print(
                json.dumps(
                    {
                        "megabytes": megabytes,
                        "workers": arguments.workers,
                        "wall_seconds": round(seconds, 1),
                        "peak_megabytes": round(peak / 1e6, 1),
                        "documents": counts,
                    }
                    | result
                ),
                flush=True,
            )
            subprocess.run(["rm", "-rf", str(root)], check=True)


if __name__ == "__main__":
    main()

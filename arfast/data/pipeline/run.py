"""The whole pipeline, from sources to a directory that appears when all of it is done."""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from arfast.data.checks import check_integer
from arfast.data.files import fsync_directory, locked_directory, read_file, write_file
from arfast.data.manifest import DatasetManifest, canonical_hash
from arfast.data.pipeline.clean import Cleaner
from arfast.data.pipeline.mixture import MIXTURE_NAME, plan_mixture, training_mixture
from arfast.data.pipeline.recipe import Recipe
from arfast.data.pipeline.report import REPORT_NAME, TABLE_NAME, make_table
from arfast.data.pipeline.stages import Stages, package_versions
from arfast.data.pipeline.workspace import Workspace
from arfast.data.prepare import BUILTIN_PREFIX
from arfast.data.tokenizer import Tokenizer

MAX_WORKERS = 1024
_FORMAT = "arfast-prepare-1"
_RECIPE_NAME = "recipe.json"
_MAX_REPORT_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class PreparedCorpus:
    """What ``prepare_corpus`` made.

    path: the directory.
    report: the content of its ``report.json``; ``content_sha256`` there is a hash of all tokens.
    seconds: how long each stage took in this run; one that an earlier run had done is missing.
    """

    path: Path
    report: dict
    seconds: dict[str, float]

    @property
    def table(self) -> str:
        """The report as plain text."""
        return make_table(self.report)


def _write_json(path: Path, value: object) -> None:
    write_file(path, json.dumps(value, indent=2, ensure_ascii=False).encode())


def _finish(stages: Stages, folder: Path, sources: list[dict], tokenizer: Tokenizer, out_dir: Path) -> dict:
    """Writes the reports beside the data sets, and gives the whole folder its final name."""
    mixture = plan_mixture(stages.recipe, {source["name"]: source["splits"]["train"]["tokens"] for source in sources})
    report = {
        "format": _FORMAT,
        "key": stages.tokens_key(stages.content, tokenizer.fingerprint),
        "content_sha256": canonical_hash([tokenizer.fingerprint, *(source["shards"] for source in sources)]),
        "tokenizer": tokenizer.fingerprint,
        "versions": package_versions(),
        "sources": sources,
        "mixture": mixture,
        "stages": stages.tally.stages,
        "notes": stages.notes,
    }
    _write_json(folder / _RECIPE_NAME, stages.recipe.to_json())
    _write_json(folder / MIXTURE_NAME, training_mixture(mixture))
    _write_json(folder / REPORT_NAME, report)
    write_file(folder / TABLE_NAME, make_table(report).encode())
    fsync_directory(folder)
    os.rename(folder, out_dir)
    fsync_directory(out_dir.parent)
    return report


def _reuse(out_dir: Path, recipe: Recipe, tokenizer: Tokenizer | None, stages: Stages) -> PreparedCorpus:
    """What stands in a directory, if the recipe would make the same."""
    if not (out_dir / REPORT_NAME).is_file():
        raise ValueError(f"prepare: output_dir must be empty or its own earlier work, got others' in {str(out_dir)!r}")
    report = json.loads(read_file(out_dir / REPORT_NAME, _MAX_REPORT_BYTES))
    stored = Recipe.from_json(json.loads(read_file(out_dir / _RECIPE_NAME, _MAX_REPORT_BYTES)))
    fingerprint = tokenizer.fingerprint if tokenizer else report["tokenizer"]
    if stored != recipe or report["key"] != stages.tokens_key(stages.content_hash(), fingerprint):
        actual = f"another recipe or other documents in {str(out_dir)!r}"
        raise ValueError(f"prepare: output_dir must be empty or hold the same, got {actual}")
    for source in report["mixture"]["sources"]:
        DatasetManifest.load(out_dir / source["data"]).verify()
    return PreparedCorpus(out_dir, report, {})


@contextlib.contextmanager
def _room(out_dir: Path, workspace: Workspace) -> Iterator[None]:
    """Turns a full disk into one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        free = shutil.disk_usage(out_dir.parent).free
        kept = f"; finished work stays in {workspace.path.name!r}" if workspace.path.exists() else ""
        actual = f"{os.strerror(error.errno)!r} with {free} bytes free{kept}"
        message = f"prepare: output_dir must have room for the work and the result, got {actual}"
        raise OSError(error.errno, message, str(out_dir)) from error


def _check_arguments(recipe: Recipe, out_dir: Path) -> None:
    if not isinstance(recipe, Recipe):
        raise TypeError(f"prepare: recipe must be a Recipe, got {type(recipe).__name__}")
    if out_dir.exists() and not out_dir.is_dir():
        raise ValueError(f"prepare: output_dir must be a directory, got the file {str(out_dir)!r}")
    for source in recipe.sources:
        if source.path.startswith(BUILTIN_PREFIX):
            continue
        if not Path(source.path).exists():
            raise FileNotFoundError(f"prepare: source {source.name!r} must exist, got {source.path!r}")
        if out_dir.is_relative_to(Path(source.path).resolve()):
            raise ValueError(f"prepare: output_dir must lie outside of the sources, got {str(out_dir)!r}")


def prepare_corpus(
    recipe: Recipe, out_dir: str | os.PathLike, *, workers: int = 1, progress: bool = False
) -> PreparedCorpus:
    """Makes data sets of token shards from raw documents: the work of `arfast prepare`.

    The result is the same to the bit for any number of workers and any order in which directories list their files. The
    directory appears under its name when all of it is done; a run that was killed continues where it was, from a hidden
    directory beside it. With one source the directory is a data set, with several it holds one for each, all with one
    tokenizer, and ``mixture.json`` says how much of each to take.

    Memory does not grow with the bytes of the corpus, and with the number of documents by 9 bytes for each, and one
    more per source; the names of all files of a directory are held too. The hidden directory takes the room of the text
    that stays, and 0.8 kB per document for signatures and the search for near-copies.

    Args:
        recipe: sources, and what to do with them.
        out_dir: directory to make; absent, empty, or the result of the same recipe and documents.
        workers: processes for the stages that see one document at a time.
        progress: shows progress on stderr.

    Raises:
        ValueError: bad argument, bad text, nothing that stays, a mixture that asks for more than there is.
        FileNotFoundError: a source, a list or a tokenizer is missing.
        ImportError: a package of the extra `data` is missing.
        OSError: the disk is full, or a file cannot be read.

    >>> import tempfile
    >>> recipe = Recipe.from_json({"sources": [{"name": "python", "path": "builtin:python"}]})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     corpus = prepare_corpus(recipe, f"{folder}/data")
    >>> corpus.report["stages"]["exact copies"]["documents_out"] > 400
    True
    """
    out_dir = Path(out_dir).resolve()
    _check_arguments(recipe, out_dir)
    workers = check_integer("prepare: workers", workers, 1, MAX_WORKERS)
    path = recipe.tokenizer.path
    tokenizer = None if path is None else Tokenizer.load(path)
    if tokenizer is not None and tokenizer.eos_token_id is None:
        raise ValueError(f"prepare: tokenizer.path must have an end-of-text token, got none in {path!r}")
    cleaner = Cleaner(recipe)
    workspace = Workspace(out_dir)
    with _room(out_dir, workspace), locked_directory(out_dir):
        try:
            stages = Stages(recipe, cleaner, workspace, workers, progress)
            if any(out_dir.iterdir()):
                corpus = _reuse(out_dir, recipe, tokenizer, stages)
                workspace.close()  # of a run that was killed after it had given the result its name
                return corpus
            stages.clean()
            splits = stages.assign(stages.drop_duplicates())
            tokenizer = tokenizer or stages.learn_tokenizer(splits)
            folder, sources = stages.tokenize(splits, tokenizer)
            report = _finish(stages, folder, sources, tokenizer, out_dir)
            workspace.close()
            return PreparedCorpus(out_dir, report, stages.seconds)
        finally:
            workspace.close_if_empty()

"""S1, S4, S5, S6, S7: no file can make this library run code, reach the network, or take for ever."""

import ast
import json
import os
import random
import sys
import warnings
from pathlib import Path

import pytest
import torch
from growth import seconds
from mutations import FILE_NAMES, mutate_safetensors, mutate_value, to_json
from tracing import STARTS

import arfast
from arfast.data import Tokenizer
from arfast.models import CausalLM, CausalLMConfig

SOURCES = sorted(Path(arfast.__file__).parent.rglob("*.py"))
MODULES = frozenset(
    "pickle cPickle dill cloudpickle marshal shelve joblib subprocess multiprocessing pty code runpy socket ssl http "
    "urllib urllib3 requests httpx aiohttp ftplib smtplib telnetlib zipfile tarfile webbrowser xmlrpc huggingface_hub "
    "torch.hub torch.package torch.utils.cpp_extension torch.distributed.checkpoint".split()
)
BUILTINS = frozenset("eval exec compile __import__ input breakpoint".split())
CALLS = frozenset(
    "torch.load torch.save torch.hub.load torch.jit.load numpy.load numpy.loadtxt yaml.load yaml.unsafe_load os.system "
    "os.popen os.execv os.execve os.execvp os.spawnv os.posix_spawn shutil.unpack_archive importlib.import_module "
    "torch.distributed.broadcast_object_list torch.distributed.all_gather_object torch.distributed.gather_object "
    "torch.distributed.scatter_object_list torch.distributed.send_object_list ctypes.PyDLL".split()
)
# What is there on purpose, and takes nothing from a file.
ALLOWED = {
    ("cli/lab.py", "importlib.import_module"): "one of the studies that are listed in it",
    ("cli/main.py", "importlib.import_module"): "one of the verbs that are listed in it",
    ("data/pipeline/packages.py", "importlib.import_module"): "one of the packages that its callers name in the source",
    ("data/pipeline/safety.py", "urllib.parse.urlsplit"): "takes a string apart",
    (
        "doctor/sequence_lengths.py",
        "subprocess",
    ): "this interpreter with this module, to measure in a process of its own",
    ("train/config.py", "compile"): "the name of a setting",
}


def imported_names(tree):
    """Local name -> dotted name of what it stands for."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def dotted(node, names):
    """The dotted name that an expression stands for, or None."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        owner = dotted(node.value, names)
        return owner and f"{owner}.{node.attr}"
    return None


def forbidden(source):
    """What a module uses of the names above, also under other names, and by getattr."""
    tree = ast.parse(source)
    names = imported_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if any(is_below(a.name, module) for module in MODULES))
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found = [f"{node.module}.{a.name}" for a in node.names]
            yield from (name for name in found if any(is_below(name, module) for module in MODULES) or name in CALLS)
        elif isinstance(node, ast.Name) and node.id in BUILTINS and node.id not in names:
            yield node.id
        elif isinstance(node, ast.Attribute):
            name = dotted(node, names)
            if name and (name in CALLS or name.partition(".")[2] in BUILTINS and name.startswith("builtins")):
                yield name
        elif isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle"):
            if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                yield f"{node.arg}=..."


def is_below(name, module):
    return name == module or name.startswith(module + ".")


def test_nothing_runs_code_or_reaches_out(record):
    found = {}
    for path in SOURCES:
        relative = path.relative_to(Path(arfast.__file__).parent).as_posix()
        for name in forbidden(path.read_text()):
            if (relative, name) not in ALLOWED:
                found.setdefault(relative, []).append(name)
    assert not found
    assert len(SOURCES) > 50
    happened = "no pickle, eval, exec, subprocess, network, archives, torch.load"
    record("S1", "every module parsed for names that run code or reach out", len(SOURCES), happened)
    record(
        "S4", "torch.load and other readers of pickle in the package", len(SOURCES), "none: no .pt file is ever read"
    )
    record("S7", "extraction of archives in the package", len(SOURCES), "none")


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from torch import load", "import torch as t\nt.load('x')", "eval('1')", "import torch.hub",
        "import numpy as np\nnp.load('x')", "x(allow_pickle=True)", "import os\nos.system('x')", "import zipfile as z",
        "import torch.distributed as dist\ndist.broadcast_object_list([])", "from urllib import request",
        "import builtins\nbuiltins.exec('x')", "from importlib import import_module",
    ],
)  # fmt: skip
def test_the_search_finds(source):
    assert list(forbidden(source))


def test_import_opens_no_connection(traced, record, tmp_path):
    """Importing everything, loading a model and using it: no socket, no other program, by the system calls."""
    CausalLM(CausalLMConfig(**SIZES)).save_pretrained(tmp_path / "model")
    Tokenizer.train(["some text"] * 3, vocab_size=262).save(tmp_path / "model")
    program = (
        "import arfast, arfast.train, arfast.data, arfast.generate, arfast.doctor, torch\n"
        f"model = arfast.CausalLM.from_pretrained({str(tmp_path / 'model')!r})\n"
        f"arfast.data.Tokenizer.load({str(tmp_path / 'model')!r})\n"
        "model.generate(torch.tensor([[1, 2]]), max_new_tokens=2)\n"
    )
    started = []

    def note(number, call):
        if call.name in ("socket", "connect", "bind"):
            started.append(call.name)

    environment = os.environ | {"HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    run = lambda: os.execve(sys.executable, [sys.executable, "-c", program], environment)
    assert traced(run, note) == 0
    assert not started
    record("S5", "import, load, generate: sockets by the system calls", 1, "none")


SIZES = dict(vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)


def test_hostile_directories_by_system_calls(memory_path, traced, amount, record):
    """What is opened, by Rust too, lies in the directory; no other program, no socket, nothing written."""
    directory = memory_path / "model"
    CausalLM(CausalLMConfig(**SIZES)).save_pretrained(directory, max_shard_bytes=8000)
    files = {path.name: path.read_bytes() for path in directory.iterdir()}
    generator, count = random.Random(7), amount(25, 1000)
    variants = []
    for _ in range(count):
        name = generator.choice(list(files))
        if name.endswith(".safetensors"):
            data = mutate_safetensors(generator, files[name])
        else:
            value = json.loads(files[name])
            if "weight_map" in value:
                value["weight_map"][generator.choice(list(value["weight_map"]))] = generator.choice(FILE_NAMES)
            else:
                value = mutate_value(generator, value)
            data = to_json(generator, value)
        variants.append((name, data))

    def load_all():
        warnings.simplefilter("ignore")
        for name, data in variants:
            (directory / name).write_bytes(data)
            os.write(mark, b"load")
            try:
                CausalLM.from_pretrained(directory)
            except (ValueError, FileNotFoundError):
                pass
            os.write(mark, b"done")
            (directory / name).write_bytes(files[name])
        os.write(mark, b"done")

    mark = os.open(os.devnull, os.O_WRONLY)
    loading, loads, opened, wrong = False, 0, 0, []
    for warm in (True, False):  # modules that the first refusals import
        if warm:
            load_all()
            continue

        def watch(number, call):
            nonlocal loading, loads, opened
            if call.name == "write" and call.arguments[0] == mark:
                loading = not loading if loads < count or loading else False
                loads += loading
                return
            if not loading:
                return
            if call.name in ("open", "openat"):
                opened += 1
                path = call.path()
                if not path.startswith((str(directory), "/proc/self", "/sys/")) or call.changes_files:
                    wrong.append((call.name, path))
            elif call.name in STARTS or call.changes_files:
                wrong.append((call.name, call.arguments))

        assert traced(load_all, watch, quietly=False) == 0
    os.close(mark)
    assert not wrong, wrong[:5]
    assert loads == count and opened > count
    record("S1", "hostile model directories loaded under ptrace", count, f"{opened} opens, all inside; nothing started")


def test_audit_of_a_resume(memory_path, record):
    """The events that Python itself reports while a run continues: no code, no program, no socket."""
    from train_doubles import make_trainer

    make_trainer(memory_path / "run", max_steps=2).fit()
    events = []
    hook = lambda event, arguments: events.append((event, arguments)) if events is not None and active else None
    active = False
    sys.addaudithook(hook)
    trainer = make_trainer(memory_path / "run", max_steps=2)
    active = True
    trainer.load(memory_path / "run" / "step-00000002")
    active = False
    bad = ("exec", "compile", "socket.", "subprocess.", "pickle.", "marshal.", "os.system", "os.exec", "os.fork")
    assert events and not [event for event, _ in events if event.startswith(bad)]
    record(
        "S1", "audit events while a checkpoint is loaded", len(events), "no exec, compile, socket, subprocess, pickle"
    )


@pytest.mark.parametrize("text", ["a", "ab ", "\n", "漢", "🙂", "0123456789", "don't ", " \t", "<|pad|>"])
def test_tokenizer_takes_linear_time(text, record):
    tokenizer = Tokenizer.train(["some text to learn from, don't ask why 123 "] * 20, vocab_size=300)

    def round_trip(characters):
        long = text * (characters // len(text))
        assert tokenizer.decode(tokenizer.encode(long)) == long

    round_trip(1000)
    short, long = seconds(round_trip, 20_000, 200_000)
    assert long < 12 * short + 0.2, (short, long)
    record("S6", "texts of one repeated piece, 10 times longer", 9, "at most 12 times the time")


def test_tokenizer_files_are_bounded(tmp_path, record):
    Tokenizer.train(["some text"] * 3, vocab_size=262).save(tmp_path)
    with open(tmp_path / "tokenizer.json", "ab") as file:
        file.truncate((256 << 20) + 1)  # a hole: it takes no room
    with pytest.raises(ValueError, match="must hold at most 268435456 bytes, got more"):
        Tokenizer.load(tmp_path)
    record("S6", "a tokenizer.json of more than 256 MiB", 1, "refused")


def test_other_formats_are_not_read(tmp_path, record):
    """A directory that has only pickled weights is refused, and the file stays closed."""
    model = CausalLM(CausalLMConfig(**SIZES))
    model.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").rename(tmp_path / "weights.txt")
    for name in ("pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"):
        (tmp_path / "pytorch_model.bin").replace(tmp_path / name) if name != "pytorch_model.bin" else None
        with pytest.raises(FileNotFoundError, match="path must contain model.safetensors"):
            CausalLM.from_pretrained(tmp_path)
        (tmp_path / name).replace(tmp_path / "pytorch_model.bin")
    record("S4", "directories with pickled weights alone", 4, "refused")

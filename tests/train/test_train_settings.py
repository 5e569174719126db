"""`arfast train`: flags over a file over a recipe; ramps as flags; wrong ones are one line."""

import json
import re

import pytest

from arfast.cli.main import main
from arfast.train import TrainConfig


def printed(capsys, *arguments):
    assert main(["train", *arguments, "--print-config"]) == 0
    return json.loads(capsys.readouterr().out)


def test_flags_over_file_over_recipe(tmp_path, capsys):
    file = tmp_path / "settings.json"
    file.write_text('{"learning_rate": 0.5, "log_every": 3, "dtype": "float32"}')
    settings = printed(capsys, "--recipe", "small", "--config", str(file), "--log-every", "7", "--no-resume")
    changed = {"learning_rate": 0.5, "log_every": 7, "dtype": "float32", "resume": False}
    assert settings == TrainConfig.recipe("small", **changed).to_dict()
    file.write_text(json.dumps(settings))
    assert printed(capsys, "--config", str(file)) == settings
    assert printed(capsys, "--config", str(file), "--dtype", "bfloat16") == settings | {"dtype": "bfloat16"}


def test_ramps_as_flags(capsys):
    ramps = ["--batch-ramp", "0:4", "8192:8", "--seqlen-ramp", "0:128", "16384:256:50000.5"]
    settings = printed(capsys, "--max-steps", "40", *ramps)
    assert settings["batch_ramp"] == [[0, 4], [8192, 8]]
    assert settings["seqlen_ramp"] == [[0, 128], [16_384, 256, 50_000.5]]
    assert settings["max_tokens"] is None


def test_wrong_settings_are_one_line(tmp_path, capsys):
    file = tmp_path / "settings.json"
    for content, message in (
        ("{", "train: config must be a JSON file, got"),
        ("[]", "train: config must hold a JSON object, got list in"),
        ('{"lr": 1}', "TrainConfig: field must be one of .* got 'lr'"),
    ):
        file.write_text(content)
        assert main(["train", "--config", str(file)]) == 2
        assert re.search(message, capsys.readouterr().err)
    for arguments, message in (
        (["--batch-ramp", "0:x"], "argument --batch-ramp: must hold FROM_TOKENS:VALUE, got '0:x'"),
        (["--recipe", "gpt5"], "argument --recipe: invalid choice: 'gpt5'"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["train", *arguments])
        assert message in capsys.readouterr().err

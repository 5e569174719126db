"""Text for the verbs that train."""

import pytest


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(40):
        (folder / f"{i}.txt").write_text(f"line {i} of a small corpus, and so on\n" * (20 + i))
    return folder

"""A data set, and one thread: tensors here are too small to share."""

import pytest
from fsdp_runs import prepare_sentences

from arfast.train import log


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    pass


@pytest.fixture(autouse=True)
def _no_plot(monkeypatch):
    monkeypatch.setattr(log, "plot_loss", lambda rows, path: True)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return prepare_sentences(tmp_path_factory.mktemp("sentences") / "data")

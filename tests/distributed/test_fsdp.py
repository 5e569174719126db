"""A run on several ranks is the run in one process: the same samples, losses, gradient norms, evaluation."""

import pytest
from fsdp_runs import DENSE, EXPERTS, consumed_by_all, largest_difference, train
from ranks import run_ranks

RUNS = {
    "dense": (DENSE, {}),
    "dense-documents": (DENSE, {"packing": "documents", "label_smoothing": 0.05, "z_loss": 1e-4}),
    "experts": (EXPERTS, {}),
    "experts-documents": (EXPERTS, {"packing": "documents", "micro_batch_size": 1}),
}


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("name", RUNS)
def test_the_first_fifty_steps(data, tmp_path, name, num_ranks):
    model, config = RUNS[name]
    expected = train(data, str(tmp_path / "one"), model, **config)
    ranks = run_ranks(_train, num_ranks, data, str(tmp_path / "several"), model, config)
    assert consumed_by_all(ranks) == expected["consumed"]
    assert len(expected["losses"]) == 50
    difference = largest_difference(ranks[0]["losses"], expected["losses"])
    print(f"{name} on {num_ranks} ranks: largest relative difference {difference:.1e}")
    assert difference < 1e-5
    assert all(rank["losses"] == ranks[0]["losses"] for rank in ranks)


def _train(data, output_dir, model, config):
    return train(data, output_dir, model, **config)

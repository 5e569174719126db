"""cross_entropy on rows of a few thousand classes and more: from sm_90 on, clusters of blocks that stay, and load the
next rows while they work. On the emulated GPU, 4 / blocks clusters of them, but at least one. Before sm_90, rows above
2048 vectors of 16 bytes wait in shared memory."""

import pytest
import torch
from accuracy import assert_bitwise_equal
from test_cross_entropy import OPTIONS, check, inputs, run, with_weight

from arfast.ops import cross_entropy

BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32
# Odd numbers of classes: every row begins at another place of its first 16 bytes, but for a dense tensor of one row.
ROWS = {
    "1 block, 8 stages, 10 rows each": (40, 5001, BFLOAT16),
    "1 block, as many as fit": (9, 16384, BFLOAT16),
    "2 blocks, 4 stages, 6 rows each": (11, 20011, BFLOAT16),
    "4 blocks": (7, 40003, BFLOAT16),
    "8 blocks": (5, 90001, BFLOAT16),
    "16 blocks": (5, 140001, BFLOAT16),
    "1 block of float32": (21, 3001, FLOAT32),
    "16 larger blocks": (4, 140003, FLOAT32),
}


@pytest.mark.random_schedules
@pytest.mark.parametrize("name", ["plain", "all"])
@pytest.mark.parametrize("rows,classes,dtype", ROWS.values(), ids=ROWS)
def test_rows_of_every_cluster_size(rows, classes, dtype, name, device, poisoned):
    options = with_weight(OPTIONS[name], classes, dtype, device)
    check(*inputs(rows, classes, dtype, device=device), options)


@pytest.mark.random_schedules
@pytest.mark.older_gpu
@pytest.mark.parametrize("rows,classes", [(30, 5001), (13, 20011)])
@pytest.mark.parametrize("kept", [[], [0], [12], [2, 3, 9], range(4, 13)], ids=str)
def test_rows_without_a_loss_take_their_turn(kept, rows, classes, device, poisoned):
    """More of them in a row than stages, first and last: their NaN are not read, and their gradient is 0."""
    logits, targets = inputs(rows, classes, BFLOAT16, ignored=False, device=device)
    ignored = torch.ones(rows, dtype=torch.bool)
    ignored[list(kept)] = False
    targets[ignored] = -100
    logits[ignored, ::7] = float("nan")
    options = dict(label_smoothing=0.1, reduction="sum")
    loss, gradient = run(cross_entropy, logits, targets, options)
    assert not gradient[ignored].any()
    if len(kept) > 0:
        expected = run(cross_entropy, logits[list(kept)], targets[list(kept)], options)
        torch.testing.assert_close(loss, expected[0], rtol=1e-6, atol=0)
        torch.testing.assert_close(gradient[list(kept)], expected[1], rtol=2**-7, atol=1e-9)
    else:
        assert loss == 0


@pytest.mark.random_schedules
@pytest.mark.parametrize("rows,classes", [(19, 5001), (6, 40003)])
def test_a_target_that_is_no_class_makes_its_row_nan(rows, classes, device, implementation):
    if implementation == "cpu":
        pytest.skip("the CPU looks at targets first")
    logits, targets = inputs(rows, classes, FLOAT32, device=device)
    options = dict(reduction="sum", z_loss=1e-3)
    wrong = torch.tensor([0, rows // 2, rows - 1])
    targets[wrong] = -100
    expected = run(cross_entropy, logits, targets, options)
    targets[wrong] = torch.tensor([classes, -1, 1 << 40])
    loss, gradient = run(cross_entropy, logits, targets, options)
    assert loss.isnan() and gradient[wrong].isnan().all()
    gradient[wrong] = 0
    assert_bitwise_equal(gradient, expected[1])


@pytest.mark.random_schedules
@pytest.mark.parametrize("rows,classes", [(10, 5008), (5, 40000)])
def test_infinite_and_nan_logits_stay_in_their_row(rows, classes, device):
    logits, targets = inputs(rows, classes, FLOAT32, ignored=False, device=device)
    logits[:, classes // 2 :] = float("-inf")  # whole parts of a row are masked
    targets %= classes // 2
    check(logits, targets, dict())
    logits[1, 17] = logits[4, 0] = float("nan")
    logits[2] = float("-inf")
    losses, gradient = run(cross_entropy, logits, targets, dict(reduction="none"), torch.ones(rows, device=device))
    assert losses.isnan().nonzero().flatten().tolist() == [1, 2, 4]
    assert gradient.isnan().any(1).nonzero().flatten().tolist() == [1, 2, 4]


@pytest.mark.random_schedules
@pytest.mark.older_gpu
@pytest.mark.parametrize("rows,classes", [(20, 5000), (7, 20008)])
@pytest.mark.parametrize("offset", [0, 8, 3])
def test_in_place_within_a_larger_tensor(rows, classes, offset, device):
    """Rows at aligned places and not, with memory between them that is not theirs."""
    logits, targets = inputs(rows, classes, BFLOAT16, device=device)
    around = torch.full((rows, classes + 24), 7.0, dtype=logits.dtype, device=device)
    leaf = around[:, offset : offset + classes].copy_(logits).detach().requires_grad_()
    options = dict(label_smoothing=0.1, reduction="sum")
    expected = cross_entropy(leaf, targets, **options)
    (gradient,) = torch.autograd.grad(expected, leaf)
    whole = around.detach().clone().requires_grad_() * 1
    loss = cross_entropy(whole[:, offset : offset + classes], targets, inplace=True, **options)
    assert_bitwise_equal(loss.detach(), expected.detach())
    assert_bitwise_equal(whole.detach()[:, offset : offset + classes], gradient)
    assert (whole[:, :offset] == 7).all() and (whole[:, offset + classes :] == 7).all()


@pytest.mark.parametrize("rows,classes", [(23, 5000), (9, 33000)])
def test_same_bits_for_every_batch_and_number_of_clusters(rows, classes, device, implementation, request):
    logits, targets = inputs(rows, classes, BFLOAT16, device=device)
    options, ones = dict(label_smoothing=0.1, reduction="none"), torch.ones(rows, device=device)
    together = run(cross_entropy, logits, targets, options, ones)
    for row in (0, rows // 2, rows - 1):
        alone = run(cross_entropy, logits[row : row + 1], targets[row : row + 1], options, ones[:1])
        for whole, part in zip(together, alone, strict=True):
            assert_bitwise_equal(whole[row : row + 1], part)
    if implementation != "emulated":
        return
    for multiprocessors in (1, 2, 16):
        request.getfixturevalue("emulator").configure(multiprocessors=multiprocessors)
        for expected, actual in zip(together, run(cross_entropy, logits, targets, options, ones), strict=True):
            assert_bitwise_equal(actual, expected)


@pytest.mark.parametrize("largest_cluster", [8, 4])
def test_a_gpu_that_refuses_large_clusters(largest_cluster, device, implementation, request):
    """Fewer and larger blocks, or two passes."""
    if implementation != "emulated":
        pytest.skip("this GPU does not refuse")
    request.getfixturevalue("emulator").configure(largest_cluster=largest_cluster)
    check(*inputs(3, 140001, BFLOAT16, device=device), dict(label_smoothing=0.1))


@pytest.mark.parametrize("rows,classes,dtype", [(22, 5001, BFLOAT16), (5, 90001, BFLOAT16), (4, 140003, FLOAT32)])
def test_without_a_gradient_the_loss_is_the_same(rows, classes, dtype, device):
    logits, targets = inputs(rows, classes, dtype, device=device)
    options = dict(label_smoothing=0.1, z_loss=1e-3)
    loss, _ = run(cross_entropy, logits, targets, options)
    assert_bitwise_equal(cross_entropy(logits, targets, **options), loss)

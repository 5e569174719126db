"""What attention refuses: one sentence for every wrong argument."""

import pytest
import torch

from arfast.ops import attention

Z = torch.zeros
INT = torch.int32


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(q=Z(2, 5, 4, 8).long()), "q must be float32, bfloat16, float16 or float64, got int64"),
        (dict(q=Z(5, 4, 8)), r"q must have shape \[B, T, H, D\] = \[\*, \*, \*, \*\], got \[5, 4, 8\]"),
        (dict(q=Z(2, 5, 0, 8)), "q must have at least one head, got 0"),
        (dict(q=Z(2, 5, 4, 0), k=Z(2, 6, 2, 0), v=Z(2, 6, 2, 0)), r"q must have a head_dim in \[1, 256\], got 0"),
        (dict(q=Z(2, 5, 4, 257), k=Z(2, 6, 2, 257), v=Z(2, 6, 2, 257)), r"a head_dim in \[1, 256\], got 257"),
        (dict(k=Z(3, 6, 2, 8)), r"k must have shape \[B, S, Hkv, D\] = \[2, \*, \*, 8\], got \[3, 6, 2, 8\]"),
        (dict(k=Z(2, 6, 2, 9)), r"k must have shape \[B, S, Hkv, D\] = \[2, \*, \*, 8\], got \[2, 6, 2, 9\]"),
        (dict(k=Z(2, 6, 3, 8), v=Z(2, 6, 3, 8)), "k must have a number of heads that divides q's 4, got 3"),
        (dict(k=Z(2, 6, 0, 8), v=Z(2, 6, 0, 8)), "k must have a number of heads that divides q's 4, got 0"),
        (dict(v=Z(2, 5, 2, 8)), r"v must have shape \[B, S, Hkv, D\] = \[2, 6, 2, 8\], got \[2, 5, 2, 8\]"),
        (dict(k=Z(2, 6, 2, 8).half()), r"k must have the dtype of q \(float32\), got float16"),
        (dict(v=Z(2, 6, 2, 8).double()), r"v must have the dtype of q \(float32\), got float64"),
        (dict(sink=Z(3)), r"sink must have shape \[H\] = \[4\], got \[3\]"),
        (dict(sink=Z(4).int()), "sink must be float32, got int32"),
        (dict(softmax_scale=0.0), "softmax_scale must be finite and positive, got 0"),
        (dict(softmax_scale=float("nan")), "softmax_scale must be finite and positive, got nan"),
        (dict(softcap=-1.0), "softcap must be finite and positive, got -1"),
        (dict(softcap=float("inf")), "softcap must be finite and positive, got inf"),
        (dict(window=-1), "window must be at least 0, got -1"),
        (dict(max_seqlen_q=4), "max_seqlen_q must be at least the longest sequence, 5, got 4"),
        (dict(cu_seqlens_k=Z(3, dtype=INT)), "cu_seqlens_k must be given exactly when cu_seqlens_q is, got a tensor"),
    ],
)
def test_errors(change, message):
    arguments = dict(q=Z(2, 5, 4, 8), k=Z(2, 6, 2, 8), v=Z(2, 6, 2, 8)) | change
    with pytest.raises(RuntimeError, match="attention: .*" + message):
        attention(**arguments)


def ends(*values, dtype=INT):
    return torch.tensor(values, dtype=dtype)


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(q=Z(1, 9, 4, 8)), r"q must have shape \[N, H, D\] = \[\*, \*, \*\], got \[1, 9, 4, 8\]"),
        (dict(k=Z(9, 2, 7)), r"k must have shape \[N, Hkv, D\] = \[\*, \*, 8\], got \[9, 2, 7\]"),
        (dict(v=Z(8, 2, 8)), r"v must have shape \[N, Hkv, D\] = \[9, 2, 8\], got \[8, 2, 8\]"),
        (dict(cu_seqlens_k=None), "cu_seqlens_k must be given exactly when cu_seqlens_q is, got None"),
        (dict(cu_seqlens_q=ends(0, 3, 9, dtype=torch.int64)), "cu_seqlens_q must be int32, got int64"),
        (dict(cu_seqlens_q=ends(1, 3, 9)), "cu_seqlens_q must start at 0, got 1"),
        (dict(cu_seqlens_q=ends(0, 7, 3)), "cu_seqlens_q must not decrease, got 3 at position 2"),
        (dict(cu_seqlens_k=ends(0, 3, 10)), "cu_seqlens_k must be at most the number of rows, 9, got 10 at position 2"),
        (dict(cu_seqlens_k=ends(0, 9)), r"cu_seqlens_k must have shape \[B \+ 1\] = \[3\], got \[2\]"),
        (dict(cu_seqlens_q=ends()), r"cu_seqlens_q must have shape \[B \+ 1\], got \[0\]"),
        (dict(cu_seqlens_q=ends(0, 9).view(1, 2)), r"cu_seqlens_q must have shape \[B \+ 1\] = \[\*\], got \[1, 2\]"),
        (dict(max_seqlen_k=5), "max_seqlen_k must be at least the longest sequence, 6, got 5"),
    ],
)
def test_packed_errors(change, message):
    documents = dict(cu_seqlens_q=ends(0, 3, 9), cu_seqlens_k=ends(0, 3, 9))
    arguments = dict(q=Z(9, 4, 8), k=Z(9, 2, 8), v=Z(9, 2, 8)) | documents | change
    with pytest.raises(RuntimeError, match="attention: " + message):
        attention(**arguments)


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(dout=Z(2, 5, 4, 7)), r"dout must have shape \[B, T, H, D\] = \[2, 5, 4, 8\], got \[2, 5, 4, 7\]"),
        (dict(dout=Z(2, 5, 4, 8).half()), r"dout must have the dtype of q \(float32\), got float16"),
        (dict(out=Z(2, 5, 8, 4)), r"out must have shape \[B, T, H, D\] = \[2, 5, 4, 8\], got \[2, 5, 8, 4\]"),
        (dict(lse=Z(2, 4, 4)), r"lse must have shape \[B, H, T\] = \[2, 4, 5\], got \[2, 4, 4\]"),
        (dict(lse=Z(2, 4, 5).double()), "lse must be float32, got float64"),
        (dict(dlse=Z(2, 5, 4)), r"dlse must have shape \[B, H, T\] = \[2, 4, 5\], got \[2, 5, 4\]"),
    ],
)
def test_backward_errors(change, message):
    q, k = Z(2, 5, 4, 8), Z(2, 5, 2, 8)
    arguments = dict(dout=q, dlse=None, q=q, k=k, v=k, out=q, lse=Z(2, 4, 5)) | change
    with pytest.raises(RuntimeError, match="attention: " + message):
        torch.ops.arfast.attention_backward(*arguments.values(), *[None] * 6, True, None, None, False)

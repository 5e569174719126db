"""Attention of queries to keys and values, causal by default, without ever holding the matrix of scores.

Forward: Dao et al. 2022, arXiv 2205.14135, algorithm 1, with grouped key-value heads (Ainslie et al. 2023, arXiv
2305.13245). With s_ij = softmax_scale * q_i . k_j over the keys j that query i sees,

    lse_i = log(sum_j exp(s_ij) + exp(sink)),  p_ij = exp(s_ij - lse_i),  out_i = sum_j p_ij v_j.

Backward, algorithm 4: with delta_i = dout_i . out_i - dlse_i and ds_ij = p_ij (dout_i . v_j - delta_i),

    dv_j = sum_i p_ij dout_i,  dq_i = softmax_scale sum_j ds_ij k_j,  dk_j = softmax_scale sum_i ds_ij q_i,
    dsink = -sum_i exp(sink - lse_i) delta_i.
"""

import math

import torch

from arfast.ops._library import in_autocast, needs_grad, register_fake

_ops = torch.ops.arfast


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sink: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention. Query i of T sees key j of S when j <= i + S - T: the last query sees the last key.

    Args:
        q: [B, T, H, D], or [N, H, D] when documents are packed; D up to 256. On the CPU float32, bfloat16, float16 or
            float64; on a GPU bfloat16 or float16. Arithmetic is in float32 (float64). Under autocast q, k and v are
            cast to its dtype.
        k, v: [B, S, Hkv, D] or [M, Hkv, D]; H % Hkv == 0, and query head h uses key-value head h // (H // Hkv).
        causal: False lets every query see all keys (to the right of its window, if there is one).
        softmax_scale: positive; 1 / sqrt(D) if None.
        window: a query sees at most this many keys before its own: j >= i + S - T - window.
        softcap: replaces the scores by softcap * tanh(scores / softcap), as Gemma 2 does.
        sink: [H], the logit of one more key per head whose value is 0; differentiable.
        cu_seqlens_q, cu_seqlens_k: int32 [B + 1], 0 = c_0 <= c_1 <= ...: document b is rows c_b to c_(b+1). Documents
            may be empty. Rows past the last one belong to none: they see nothing and nobody sees them.
        max_seqlen_q, max_seqlen_k: bounds on the documents' lengths, for GPUs; checked on the CPU.
        return_lse: return (out, lse).
        deterministic: whether the gradients have the same bits in every run; None follows
            torch.use_deterministic_algorithms. A GPU then adds up those of q and sink in a fixed order, which takes
            longer. All else, and everything on the CPU, is deterministic anyway, there for every number of threads.

    Returns:
        out, like q and dense. With return_lse also lse in float32 (float64), natural logarithm, the sink included:
        [B, H, T] or [H, N]; differentiable. A row that sees nothing has out 0, lse -inf (the sink's logit, if there is
        one) and gradients 0.

    Raises:
        RuntimeError: `attention: <argument> must <rule>, got <actual>`.

    Gradients of q, k, v and sink. out and lse of a sequence do not depend on the batch around it. The tensors may be
    strided (D dense): slices of one projection are read in place.

    Example:
        >>> q, k, v = torch.randn(1, 10, 4, 64), torch.randn(1, 10, 2, 64), torch.randn(1, 10, 2, 64)
        >>> attention(q, k, v, window=4).shape
        torch.Size([1, 10, 4, 64])
    """
    if in_autocast(q) and q.dtype != torch.float64:
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    if sink is not None and sink.is_floating_point():
        sink = sink.to(statistics_dtype(q))
    options = (max_seqlen_q, max_seqlen_k, softmax_scale, causal, window, softcap)
    if needs_grad(q, k, v, sink):
        # torch.compile takes no tensor twice: self-attention hands over its documents once.
        same = cu_seqlens_k is cu_seqlens_q
        cu_seqlens = (cu_seqlens_q, None if same else cu_seqlens_k)
        out, lse = _Attention.apply(q, k, v, sink, *cu_seqlens, same, return_lse, deterministic, *options)
    else:
        out, lse = _ops.attention_forward(q, k, v, sink, cu_seqlens_q, cu_seqlens_k, *options)
    return (out, lse) if return_lse else out


def attention_reference(
    q, k, v, *, causal=True, softmax_scale=None, window=None, softcap=None, sink=None, cu_seqlens_q=None,
    cu_seqlens_k=None, return_lse=False,
):  # fmt: skip
    """The specification of `attention` in plain torch."""
    if cu_seqlens_q is not None:
        options = dict(causal=causal, softmax_scale=softmax_scale, window=window, softcap=softcap, sink=sink)
        out, lse = torch.zeros_like(q), q.new_full(q.shape[1::-1], -math.inf, dtype=statistics_dtype(q))
        starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        for a, b, c, d in zip(starts_q, starts_q[1:], starts_k, starts_k[1:], strict=False):
            document = attention_reference(q[None, a:b], k[None, c:d], v[None, c:d], return_lse=True, **options)
            out[a:b], lse[:, a:b] = document[0][0], document[1][0]
        return (out, lse) if return_lse else out
    group = q.shape[2] // k.shape[2]
    heads_q, heads_k, heads_v = (x.transpose(1, 2) for x in (q, k, v))
    heads_k, heads_v = heads_k.repeat_interleave(group, 1), heads_v.repeat_interleave(group, 1)
    scores = (heads_q @ heads_k.mT).to(statistics_dtype(q))
    scores = scores * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1] - torch.arange(k.shape[1])
    hidden = (causal & (distance < 0)) | (distance > (math.inf if window is None else window))
    scores = scores.masked_fill(hidden.to(q.device), -math.inf)
    sinks = scores.new_full((q.shape[2],), -math.inf) if sink is None else sink.to(scores.dtype)
    lse = torch.cat([scores, sinks[:, None, None].expand(*scores.shape[:3], 1)], -1).logsumexp(-1)
    p = (scores - lse.masked_fill(lse == -math.inf, 0)[..., None]).exp()
    out = (p.to(q.dtype) @ heads_v).transpose(1, 2)
    return (out, lse) if return_lse else out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, sink, cu_seqlens_q, cu_seqlens_k, same_cu_seqlens, return_lse, deterministic, *options):
        cu_seqlens = (cu_seqlens_q, cu_seqlens_q if same_cu_seqlens else cu_seqlens_k)
        out, lse = _ops.attention_forward(q, k, v, sink, *cu_seqlens, *options)
        ctx.save_for_backward(q, k, v, out, lse, sink, *cu_seqlens)
        ctx.options, ctx.deterministic = options, deterministic
        ctx.set_materialize_grads(False)
        if not return_lse:
            ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout, dlse):
        q, k, v, out, lse, sink, *cu_seqlens = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        deterministic = ctx.deterministic
        if deterministic is None:
            deterministic = torch.are_deterministic_algorithms_enabled()
        dq, dk, dv, dsink = _ops.attention_backward(
            dout, dlse, q, k, v, out, lse, sink, *cu_seqlens, *ctx.options, deterministic
        )
        return dq, dk, dv, dsink if sink is not None else None, *[None] * 11


def statistics_dtype(q):
    return torch.float64 if q.dtype == torch.float64 else torch.float32


@register_fake("attention_forward")
def _(q, k, v, sink, cu_seqlens_q, *options):
    shape = (q.shape[0], q.shape[2], q.shape[1]) if cu_seqlens_q is None else (q.shape[1], q.shape[0])
    return q.new_empty(q.shape), q.new_empty(shape, dtype=statistics_dtype(q))


@register_fake("attention_backward")
def _(dout, dlse, q, k, v, out, lse, sink, *options):
    dsink = q.new_empty(q.shape[-2] if sink is not None else 0, dtype=statistics_dtype(q))
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsink

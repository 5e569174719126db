"""Tokens as indicator vectors, and why an embedding is a product with them: X[v, t] = 1 where token t is v, E^T X[:, t]
is row v of E.

A text of T tokens from a vocabulary V is a matrix of |V| rows and T columns with a single one in each column. The sum
of the columns counts the tokens and forgets their order; the matrix keeps it, and gives the tokens back.

>>> X = indicators(torch.tensor([2, 0, 1]), vocab_size=4)
>>> X.tolist()
[[0, 1, 0], [0, 0, 1], [1, 0, 0], [0, 0, 0]]
>>> counts(X).tolist(), counts(X.flip(1)).tolist()  # forwards and backwards
([1, 1, 1, 0], [1, 1, 1, 0])
>>> tokens(X).tolist(), tokens(X.flip(1)).tolist()
([2, 0, 1], [1, 0, 2])
>>> E = torch.arange(8.0).view(4, 2)  # a row per token: multiplied by an indicator vector, it is looked up
>>> torch.equal(embed(X, E), torch.nn.functional.embedding(tokens(X), E))
True
"""

import torch
from torch import Tensor


def indicators(token_ids: Tensor, vocab_size: int) -> Tensor:
    """The matrix X [V, T] of zeros and ones, int64, whose column t is the indicator vector of token t.

    Args:
        token_ids: integers [T] in [0, V).

    Raises:
        ValueError: `indicators: <argument> must <rule>, got <actual>`.
    """
    if token_ids.dim() != 1 or token_ids.is_floating_point():
        got = f"{token_ids.dtype} {list(token_ids.shape)}"
        raise ValueError(f"indicators: token_ids must be integers [T], got {got}")
    wrong = token_ids[(token_ids < 0) | (token_ids >= vocab_size)]
    if len(wrong) > 0:
        raise ValueError(f"indicators: token_ids must be in [0, vocab_size={vocab_size}), got {int(wrong[0])}")
    return (torch.arange(vocab_size, device=token_ids.device)[:, None] == token_ids).long()


def counts(matrix: Tensor) -> Tensor:
    """How often each token occurs, [V]: the sum of the columns, the same for every order of the tokens."""
    return matrix.sum(1)


def tokens(matrix: Tensor) -> Tensor:
    """The token ids [T] of a matrix [V, T], in their order.

    Raises:
        ValueError: a column is no indicator vector.
    """
    if matrix.dim() != 2 or bool(((matrix != 0) & (matrix != 1)).any()) or bool((matrix.sum(0) != 1).any()):
        raise ValueError("tokens: matrix must have a single one and else zeros in each column, got another")
    return matrix.argmax(0)


def embed(matrix: Tensor, embedding: Tensor) -> Tensor:
    """X^T E, [T, d]: with an indicator vector, the product with the embedding [V, d] is one of its rows; with other
    weights over the vocabulary, a mixture of rows. A lookup gives the same in time and memory independent of V."""
    return matrix.to(embedding.dtype).T @ embedding

"""Arguments that every op which draws tokens refuses, and what it says."""

import math

import torch

STATE = torch.zeros(2, 3, dtype=torch.int64)  # of two rows

FILTER_ERRORS = [
    (dict(temperature=-0.5), "temperature must be at least 0 and a finite float32, got -0.5"),
    (dict(temperature=math.nan), "temperature must be at least 0 and a finite float32, got nan"),
    (dict(temperature=1e39), r"temperature must be at least 0 and a finite float32, got 1e\+39"),
    (dict(top_k=-1), "top_k must be at least 0, got -1"),
    (dict(top_p=-0.1), r"top_p must be in \[0, 1\], got -0.1"),
    (dict(top_p=1.1), r"top_p must be in \[0, 1\], got 1.1"),
    (dict(top_p=math.nan), r"top_p must be in \[0, 1\], got nan"),
    (dict(min_p=-0.1), r"min_p must be in \[0, 1\], got -0.1"),
    (dict(min_p=1.5), r"min_p must be in \[0, 1\], got 1.5"),
    (dict(min_p=math.nan), r"min_p must be in \[0, 1\], got nan"),
    (
        dict(generator_state=torch.zeros(3, 3).long()),
        r"generator_state must have shape \[[RB], 3\] = \[2, 3\], got \[3, 3\]",
    ),
    (dict(generator_state=STATE[:, :2]), r"generator_state must have shape \[[RB], 3\] = \[2, 3\], got \[2, 2\]"),
    (dict(generator_state=STATE.float()), "generator_state must be int64, got float32"),
    (dict(generator_state=STATE[:1].expand(2, 3)), "generator_state must have memory for every element, got a stride"),
]

"""The integer functions of the attention kernels on all small sizes: what a query sees, which tiles a block visits,
into which ranges a cache is divided."""

import itertools

import pytest

SIZES = range(8)
WINDOWS = (-1, 0, 1, 2, 5, 1000, 2**40)


def visible_keys(causal, window, num_queries, num_keys):
    """By definition: for each query the keys that it sees. The last query stands at the last key."""
    sees = []
    for query in range(num_queries):
        distances = {key: query + num_keys - num_queries - key for key in range(num_keys)}
        sees.append([k for k, d in distances.items() if not (causal and d < 0) and not (0 <= window < d)])
    return sees


def problems(integers):
    for causal, window, num_queries, num_keys in itertools.product((True, False), WINDOWS, SIZES, SIZES):
        visible = visible_keys(causal, window, num_queries, num_keys)
        yield integers.KeyRange(causal, window, num_queries, num_keys), visible, num_queries, num_keys


def tiles(size, tile):
    """(first, last) of the tiles of a sequence."""
    return [(first, min(first + tile, size) - 1) for first in range(0, size, tile)]


def test_a_query_sees_what_the_definition_says(integers):
    for visible, expected, num_queries, num_keys in problems(integers):
        for query in range(num_queries):
            assert list(range(visible.begin(query), visible.end(query))) == expected[query]
            assert [key for key in range(num_keys) if not visible.hides(query, query, key, key)] == expected[query]


@pytest.mark.parametrize("query_tile,key_tile", [(2, 2), (2, 3), (4, 2), (1, 1), (8, 8)])
def test_tiles_that_are_left_out_have_nothing_visible(integers, query_tile, key_tile):
    for visible, expected, num_queries, num_keys in problems(integers):
        for first, last in tiles(num_queries, query_tile):
            visited = range(*visible.key_tiles(key_tile, first, last))
            assert all(0 <= tile * key_tile < num_keys for tile in visited)
            for query in range(first, last + 1):
                assert all(key // key_tile in visited for key in expected[query])
        for first, last in tiles(num_keys, key_tile):
            visited = range(*visible.query_tiles(query_tile, first, last))
            assert all(0 <= tile * query_tile < num_queries for tile in visited)
            for query in range(num_queries):
                assert query // query_tile in visited or not set(expected[query]) & set(range(first, last + 1))


@pytest.mark.parametrize("query_tile,key_tile", [(2, 2), (2, 3), (4, 2), (1, 1), (8, 8)])
def test_tiles_are_masked_exactly_where_something_is_hidden(integers, query_tile, key_tile):
    for visible, expected, num_queries, num_keys in problems(integers):
        for first, last in tiles(num_queries, query_tile):
            for first_key, last_key in tiles(num_keys, key_tile):
                keys = set(range(first_key, last_key + 1))
                hidden = any(keys - set(expected[query]) for query in range(first, last + 1))
                assert visible.hides(first, last, first_key, last_key) == hidden
                assert hidden <= visible.hides(first, last, first_key, first_key + key_tile - 1)


@pytest.mark.parametrize("query_tile,key_tile", [(2, 2), (2, 3), (4, 2), (1, 1), (8, 8)])
def test_blocks_of_keys_add_to_a_tile_of_queries_in_turns(integers, query_tile, key_tile):
    """The one with the last keys begins, and none waits for a block that does not come."""
    for visible, _, num_queries, num_keys in problems(integers):
        for first, last in tiles(num_queries, query_tile):
            visitors = [
                first_key
                for first_key, last_key in tiles(num_keys, key_tile)
                if first // query_tile in range(*visible.query_tiles(query_tile, first_key, last_key))
            ]
            turns = [visible.later_key_tiles(key_tile, last, first_key) for first_key in reversed(visitors)]
            assert turns == list(range(len(visitors)))


@pytest.mark.parametrize("num_splits", [0, 1, 2, 3, 7, 100])
@pytest.mark.parametrize("num_queries", [1, 2, 5, 70])
def test_ranges_of_a_cache_divide_the_visible_keys(integers, num_queries, num_splits):
    for window in (-1, 0, 1, 62, 63, 64, 65, 510, 511, 512, 513, 600, 2**40):
        most = 0
        for seqlen in range(1, 1200):
            oldest = max(0, seqlen - num_queries - window) if window >= 0 else 0
            ranges = integers.decode_ranges(seqlen, num_queries, window, num_splits)
            begins, ends = zip(*ranges)
            assert begins[0] == oldest and ends[-1] == seqlen and begins[1:] == ends[:-1]
            assert all(begin < end for begin, end in ranges)
            assert all(begin % 64 == 0 for begin in begins[1:])
            assert num_splits > 0 or all(end - begin <= 512 for begin, end in ranges)
            most = max(most, len(ranges))
            assert most <= integers.most_decode_splits(seqlen, num_queries, window, num_splits)
    assert integers.decode_ranges(0, num_queries, 3, num_splits) == []


@pytest.mark.parametrize("num_splits,window", [(0, -1), (0, 40), (3, -1), (3, 90), (1, 0)])
@pytest.mark.parametrize("num_queries,group", [(1, 1), (1, 4), (2, 3), (5, 4), (3, 16)])
@pytest.mark.parametrize("rows", [3, 16])
def test_blocks_of_a_decoding_step_cover_everything_once(integers, rows, num_queries, group, num_splits, window):
    seqlens, num_kv_heads = [0, 1, 700, 2, 190], 2
    find = integers.decode_blocks_of_3_rows if rows == 3 else integers.decode_blocks_of_16_rows
    blocks = find(seqlens, num_queries, group, num_kv_heads, window, num_splits)
    written, seen = {}, {}
    for sequence, kv_head, alone, block in blocks:
        for row, keys in block:
            if row < num_queries * group:
                written.setdefault((sequence, kv_head, row), []).append(alone)
                seen.setdefault((sequence, kv_head, row), []).extend(keys)
            else:
                assert keys == []
    for sequence, seqlen in enumerate(seqlens):
        expected = visible_keys(True, window, num_queries, seqlen)
        for kv_head, row in itertools.product(range(num_kv_heads), range(num_queries * group)):
            alone, keys = (table.pop((sequence, kv_head, row)) for table in (written, seen))
            assert sorted(keys) == expected[row // group]
            assert alone == [True] or (len(alone) > 1 and not any(alone))
    assert not written and not seen

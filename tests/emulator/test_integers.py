"""The integer functions of the kernels, on all arguments that matter."""

import pytest


def test_swizzle_moves_16_byte_chunks_within_their_row(integers):
    for offset in range(0, 4096):
        moved = integers.swizzle_128(offset)
        assert moved // 128 == offset // 128 and moved % 16 == offset % 16
    assert sorted(map(integers.swizzle_128, range(4096))) == list(range(4096))


def test_swizzled_columns_of_eight_rows_are_free_of_bank_conflicts(integers):
    """What ldmatrix reads: the same 16 bytes of 8 consecutive rows lie in 8 different groups of 4 banks."""
    for first_row in range(0, 32, 8):
        for column in range(0, 128, 16):
            offsets = [integers.swizzle_128((first_row + row) * 128 + column) for row in range(8)]
            assert len({offset % 128 // 16 for offset in offsets}) == 8


@pytest.mark.parametrize("threads,rows,columns", [(32, 16, 8), (128, 64, 8), (128, 64, 64), (128, 64, 256)])
def test_fragments_cover_a_tile_once(integers, threads, rows, columns):
    """mma.sync's of a warp and wgmma's of a warpgroup; two neighbours of a thread are neighbours in a row."""
    seen = set()
    for thread in range(threads):
        before = None
        for i in range(rows * columns // threads):
            place = integers.fragment_row(thread, i), integers.fragment_column(thread, i)
            seen.add(place)
            if i % 2:
                assert place == (before[0], before[1] + 1)
            before = place
    assert seen == {(row, column) for row in range(rows) for column in range(columns)}


@pytest.mark.parametrize("address,leading,stride", [(1024, 16, 1024), (0x2C00, 8192, 1024), (226 << 10, 0, 2048)])
def test_descriptors_hold_their_fields(integers, address, leading, stride):
    value = integers.swizzled_descriptor(address, leading, stride)
    fields = (value & 0x3FFF) * 16, (value >> 16 & 0x3FFF) * 16, (value >> 32 & 0x3FFF) * 16, value >> 62
    assert fields == (address, leading, stride, 1)


@pytest.mark.parametrize("element_size", [2, 4])
def test_parts_of_beam_prune_cover_a_row_and_fit_the_registers(integers, element_size):
    elements = 16 // element_size
    for rows in (1, 3, 8, 32, 64, 256, 5000):
        for vocab_size in (1, 7, 8, 9, 2047, 2048, 32000, 50257, 128256, 262144, 2**31 - 1):
            parts, vectors = integers.beam_prune_parts(rows, vocab_size, element_size)
            most = (elements - 1 + vocab_size + elements - 1) // elements  # of a row that begins within a vector
            assert parts * vectors >= most
            assert (parts - 1) * vectors < most + 2  # no part without work but for the alignment
            assert vectors * elements <= 256 * 32  # elements that 256 threads hold
            assert parts * rows <= 512 or vectors * elements == 256 * 32


@pytest.mark.parametrize("largest_cluster", [8, 16])
def test_the_ring_of_cross_entropy_covers_a_row_and_fits_its_memory(integers, largest_cluster):
    for vectors in range(513, largest_cluster * 4096 + 1, 7 if largest_cluster == 8 else 13):
        threads, blocks, part, stages = integers.cross_entropy_ring_shape(vectors, largest_cluster)
        assert (blocks - 1) * part < vectors <= blocks * part  # no block without work
        assert part <= 8 * threads and part % 8 == 0  # what the threads hold
        assert 3 <= stages <= 8 and stages * part <= 3 * 8 * threads
        # The fewest blocks, and smaller ones first.
        assert blocks == 1 or vectors > blocks // 2 * 8 * threads
        assert threads == 256 or vectors > largest_cluster * 8 * 256
    for vectors in (1, 512, largest_cluster * 4096 + 1, 1 << 40):
        assert integers.cross_entropy_ring_shape(vectors, largest_cluster)[1] == 0


@pytest.mark.parametrize(
    "vocab_size,element_size,expected",
    [
        (8192, 2, (256, 1, 1024, 6)),
        (32000, 2, (256, 2, 2000, 3)),
        (50304, 2, (256, 4, 1576, 3)),
        (128256, 2, (256, 8, 2008, 3)),
        (152064, 2, (256, 16, 1192, 5)),
        (262144, 2, (256, 16, 2048, 3)),
        (128256, 4, (256, 16, 2008, 3)),
        (262144, 4, (512, 16, 4096, 3)),
    ],
)
def test_the_ring_of_cross_entropy_for_known_vocabularies(integers, vocab_size, element_size, expected):
    assert integers.cross_entropy_ring_shape(vocab_size * element_size // 16, 16) == expected


@pytest.mark.parametrize("element_size", [2, 4])
def test_the_longest_row_of_cross_entropy(integers, element_size):
    for vocab_size in range(1, 40):
        for padding in range(9):
            for offset in range(0, 16, element_size):
                stride = vocab_size + padding
                begins = [(offset + row * stride * element_size) % 16 for row in range(16)]
                vectors = max((begin + vocab_size * element_size + 15) // 16 for begin in begins)
                bound = integers.cross_entropy_row_vectors(4096 + offset, stride, vocab_size, element_size)
                assert vectors <= bound <= vectors + 1
                if set(begins) == {0}:
                    assert bound == vectors

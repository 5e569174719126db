"""Streamers for tests."""


class Recorder:
    """Keeps what it gets."""

    def __init__(self):
        self.values, self.ended = [], 0

    def put(self, value):
        self.values.append(value)

    def end(self):
        self.ended += 1

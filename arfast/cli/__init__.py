"""The command line: one small module per verb, which only parses; the work is done by the library."""

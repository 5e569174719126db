"""`python -m arfast` and `torchrun -m arfast`: the same as the `arfast` command."""

import sys

from arfast.cli.main import main

sys.exit(main())

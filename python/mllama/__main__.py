"""`python -m mllama`."""

import sys

from mllama.cli import main

sys.exit(main())

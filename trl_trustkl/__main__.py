"""`python -m trl_trustkl`: the command line where the `trustkl` script is not on the path."""

import sys

from .cli import main

sys.exit(main())

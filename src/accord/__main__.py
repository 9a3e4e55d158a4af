"""`python -m accord`."""

import sys

from accord.cli.main import main

sys.exit(main())

"""`python3 -m e2e.cluster VERB`, from the repository's root."""

import sys

from e2e.cluster.commands import main

sys.exit(main())

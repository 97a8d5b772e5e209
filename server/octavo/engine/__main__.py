"""`python -m octavo.engine`: run the engine process."""

import sys

from octavo.engine.process import main

if __name__ == "__main__":
    sys.exit(main())

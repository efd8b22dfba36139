"""`python -m seekforge.runtime.ray ENGINE`: `seekforge ray ENGINE`."""

import sys

from seekforge.runtime.cli.main import main

if __name__ == "__main__":
    main(["ray", *sys.argv[1:]])

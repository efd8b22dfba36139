"""`python -m seekforge.runtime.dynamo ENGINE`, as workers of Dynamo are started: `seekforge dynamo ENGINE`."""

import sys

from seekforge.runtime.cli.main import main

if __name__ == "__main__":
    main(["dynamo", *sys.argv[1:]])

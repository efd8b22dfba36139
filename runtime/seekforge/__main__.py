"""`python -m seekforge`: the command line."""

from seekforge.runtime.cli.main import main

if __name__ == "__main__":
    main()

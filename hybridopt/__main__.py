"""`python -m hybridopt`: the command line."""

from hybridopt.cli import main

if __name__ == "__main__":
    main()

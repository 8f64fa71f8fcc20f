"""``python -m zerodeploy``: the command line."""

from zerodeploy.cli.main import main

if __name__ == "__main__":
    main()

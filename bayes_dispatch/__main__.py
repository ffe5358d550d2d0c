"""``python -m bayes_dispatch``: the command line."""

from bayes_dispatch.cli import main

if __name__ == "__main__":
    main()

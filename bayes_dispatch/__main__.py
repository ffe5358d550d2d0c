"""``python -m bayes_dispatch``: the command line."""

from bayes_dispatch.app.commands.main import main

if __name__ == "__main__":
    main()

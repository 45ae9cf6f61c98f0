"""``python -m fastlth`` is the command ``fastlth``."""

from fastlth.cli.main import main

if __name__ == "__main__":
    main()

"""``python -m umfa.cli`` is ``umfa``."""

from umfa.cli import main

if __name__ == "__main__":
    main()

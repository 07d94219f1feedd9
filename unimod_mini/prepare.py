"""The command `python -m unimod_mini.prepare`, see data/prepare.py."""

from .data.prepare import main

if __name__ == "__main__":
    main()

"""`python -m graftwork.cli`."""

from graftwork.cli import main

if __name__ == "__main__":
    main()

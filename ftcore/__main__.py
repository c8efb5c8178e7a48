"""`python -m ftcore` is `ftcore`."""

from ftcore.cli import main

if __name__ == "__main__":
    main()

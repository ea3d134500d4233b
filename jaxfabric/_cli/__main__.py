"""`python -P -m jaxfabric._cli` is the same as `jaxfabric`."""

from jaxfabric._cli import main

if __name__ == "__main__":
    main()

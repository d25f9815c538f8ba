"""``python -m proxy`` is the command ``pullcache``."""

from proxy.cli import main

if __name__ == "__main__":
    main(prog_name="pullcache")

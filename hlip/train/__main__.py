import sys

from .pretrain import main

if __name__ == "__main__":
    sys.exit(main())

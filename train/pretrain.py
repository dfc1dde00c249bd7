"""Pre-train on packed batches: every study brings its own number of scans."""

import sys

from hlip.train.pretrain import main

if __name__ == "__main__":
    sys.exit(main())

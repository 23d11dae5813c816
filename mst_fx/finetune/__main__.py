"""``python -m mst_fx.finetune``, for launchers that start modules."""

import sys

from mst_fx.cli import main

if __name__ == "__main__":
    sys.exit(main(["finetune", *sys.argv[1:]]))

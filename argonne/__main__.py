"""`python -m argonne`, and with it `torchrun -m argonne pretrain ...`."""

import sys

from argonne.cli import main

sys.exit(main())
